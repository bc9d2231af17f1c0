#!/usr/bin/env python3
"""A checkpoint of `baleen synth` as GGUF, by llama.cpp's own converter: experts stay MXFP4, FP8 matrices become Q8_0.

  to_gguf.py LLAMA_CPP_SOURCE CHECKPOINT OUT.gguf

Its tokenizer is not one that the converter knows: left out, peers are given token ids."""
import runpy
import sys

source, model, out = sys.argv[1:4]
sys.path[:0] = [source, source + "/gguf-py"]
from conversion import deepseek  # noqa: E402


def no_vocabulary(self):
    self.gguf_writer.add_tokenizer_model("none")
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


deepseek.DeepseekV4Model.set_vocab = no_vocabulary
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "bf16"]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
