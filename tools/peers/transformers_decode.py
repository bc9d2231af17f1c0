#!/usr/bin/env python3
"""transformers: a whole model in BF16, for `baleen bench serve.model --peer`. Prints a line for each batch and one for the prompt.

  transformers_decode.py CHECKPOINT_BF16 THREADS BATCHES PROMPT STEPS     (to_bf16.py makes such a checkpoint)

One thread: processor time of the process; more: time on the wall."""
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def timed(clock, n, step):
    took = []
    for _ in range(n):
        start = clock()
        step()
        took.append(clock() - start)
    return statistics.median(took)


def main():
    folder, threads, batches, prompt, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
    random = torch.Generator().manual_seed(5)

    def tokens(*shape):
        return torch.randint(2, model.config.vocab_size, shape, generator=random)

    with torch.inference_mode():
        model(tokens(1, 64), logits_to_keep=1)
        for batch in map(int, batches.split(",")):
            state = [model(tokens(batch, 16), use_cache=True, logits_to_keep=1)]

            def step():
                likeliest = state[0].logits[:, -1].argmax(-1, keepdim=True)
                state[0] = model(likeliest, past_key_values=state[0].past_key_values, use_cache=True, logits_to_keep=1)

            print(f"peer=transformers case=decode_b{batch} value={batch / timed(clock, steps, step):.2f} unit=tok/s", flush=True)
        ids = tokens(1, prompt)
        print(f"peer=transformers case=prefill_p{prompt} value={prompt / timed(clock, 3, lambda: model(ids, logits_to_keep=1)):.2f} unit=tok/s")


main()
