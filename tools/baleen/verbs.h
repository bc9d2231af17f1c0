/* The verbs of the `baleen` command. Each has an option table of its own; argv[0] is the verb's word. They
 * return the exit code: 0 done, 1 failed, 2 not understood. Thread: main. */
#pragma once

int verb_up(int argc, char **argv);
int verb_chat(int argc, char **argv);
int verb_status(int argc, char **argv);
int verb_scale(int argc, char **argv);
int verb_drain(int argc, char **argv);
int verb_rebalance(int argc, char **argv);
int verb_keys(int argc, char **argv);
int verb_certs(int argc, char **argv);
int verb_logits(int argc, char **argv);
int verb_verify(int argc, char **argv);
int verb_tokenize(int argc, char **argv);
int verb_encode(int argc, char **argv);
int verb_bench(int argc, char **argv);
int verb_parse(int argc, char **argv);
int verb_plan(int argc, char **argv);
int verb_synth(int argc, char **argv);
