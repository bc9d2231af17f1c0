# Text: tokenizer, chat encoding, completion parser.
add_library(md_text STATIC added.c bpe.c chat.c chat_check.c chat_convert.c chat_request.c chat_tools.c detok.c json.c
            parser.c pretokenize.c prompt.c tokenizer.c tokenizer_load.c utf8.c)
target_link_libraries(md_text PUBLIC cm_base PkgConfig::JANSSON PkgConfig::PCRE2)
