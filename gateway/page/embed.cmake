# index.html with style.css and script.js put in, as a C array, and the hashes that its Content-Security-Policy names.
#   cmake -DPARTS=FOLDER -DOUT=page.h -P embed.cmake
set(DIGITS "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")

# The SHA-256 of text in base64: 32 bytes are ten groups of three, then two.
function(hash_of text out)
  string(SHA256 hex "${text}")
  string(APPEND hex "00")
  set(base64 "")
  foreach(group RANGE 10)
    math(EXPR at "${group} * 6")
    string(SUBSTRING "${hex}" ${at} 6 bytes)
    foreach(shift 18 12 6 0)
      math(EXPR digit "0x${bytes} >> ${shift} & 63")
      string(SUBSTRING "${DIGITS}" ${digit} 1 character)
      string(APPEND base64 ${character})
    endforeach()
  endforeach()
  string(SUBSTRING "${base64}" 0 43 base64)
  set(${out} "sha256-${base64}=" PARENT_SCOPE)
endfunction()

file(READ ${PARTS}/style.css style)
file(READ ${PARTS}/script.js script)
file(READ ${PARTS}/index.html page)
hash_of("${style}" style_hash)
hash_of("${script}" script_hash)
string(REPLACE "@STYLE@" "${style}" page "${page}")
string(REPLACE "@SCRIPT@" "${script}" page "${page}")

file(WRITE ${OUT}.html "${page}")
file(READ ${OUT}.html bytes HEX)
string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
string(REGEX REPLACE "(................................................................................)" "\\1\n" bytes "${bytes}")
file(WRITE ${OUT} "/* Made by gateway/page/embed.cmake. */\n"
     "#define PAGE_STYLE_HASH \"'${style_hash}'\"\n#define PAGE_SCRIPT_HASH \"'${script_hash}'\"\n"
     "static const unsigned char PAGE[] = {\n${bytes}};\n")
