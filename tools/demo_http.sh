#!/usr/bin/env bash
# Asks an OpenAI-compatible server several questions at once and shows each answer as it stood when its stream ended.
#   tools/demo_http.sh HOST:PORT QUESTION...
# bash alone, so that a machine without curl can run the demo.
set -euo pipefail
host=${1%:*} port=${1##*:}
shift

ask() {
    local body="{\"model\": \"nano\", \"stream\": true, \"stream_options\": {\"include_usage\": true}, \"temperature\": 0, \"thinking\": {\"type\": \"disabled\"}, \"messages\": [{\"role\": \"user\", \"content\": \"$1\"}]}"
    local answer="" line piece tokens=0 start=$EPOCHREALTIME
    exec 3<>"/dev/tcp/$host/$port"
    printf 'POST /v1/chat/completions HTTP/1.1\r\nHost: %s:%s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s' \
        "$host" "$port" "${#body}" "$body" >&3
    while IFS= read -r line <&3; do
        case "$line" in
        *'"content":"'*)
            piece=${line#*\"content\":\"}
            piece=${piece%%\"*}
            answer+=$piece
            ;;
        *'"completion_tokens":'*)
            tokens=${line#*\"completion_tokens\":}
            tokens=${tokens%%[!0-9]*}
            ;;
        *'[DONE]'*) break ;;
        esac
    done
    exec 3>&-
    local us=$((${EPOCHREALTIME/./} - ${start/./}))
    printf '%s\n  [%d tokens in %d ms, %d tok/s]\n' "$answer" "$tokens" $((us / 1000)) $((tokens * 1000000 / us))
}

pids=()
for question in "$@"; do
    ask "$question" &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    wait "$pid"
done
