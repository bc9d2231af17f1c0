# The bytes of a file as a C array: cmake -DIN=services.pb -DOUT=services.c -P embed.cmake
file(READ ${IN} hex HEX)
string(REGEX REPLACE "(................................)" "\\1\n" hex "${hex}")
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," hex "${hex}")
file(WRITE ${OUT} "#include \"proto/services.h\"\n\nconst uint8_t pr_services[] = {\n${hex}};\nconst size_t pr_services_bytes = sizeof(pr_services);\n")
