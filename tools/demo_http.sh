#!/usr/bin/env bash
# Asks an OpenAI-compatible server several questions at once and shows each answer as it stood when its stream ended.
#   tools/demo_http.sh HOST:PORT QUESTION...
# bash alone, so that a machine without curl can run the demo.
set -euo pipefail
host=${1%:*} port=${1##*:}
shift

ask() {
    local body="{\"model\": \"nano\", \"stream\": true, \"temperature\": 0, \"thinking\": {\"type\": \"disabled\"}, \"messages\": [{\"role\": \"user\", \"content\": \"$1\"}]}"
    local answer="" line piece count=0 start=$EPOCHREALTIME
    exec 3<>"/dev/tcp/$host/$port"
    printf 'POST /v1/chat/completions HTTP/1.1\r\nHost: %s:%s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s' \
        "$host" "$port" "${#body}" "$body" >&3
    while IFS= read -r line <&3; do
        case "$line" in
        *'"content":"'*)
            piece=${line#*\"content\":\"}
            piece=${piece%%\"*}
            answer+=$piece
            [ -n "$piece" ] && count=$((count + 1))
            ;;
        *'[DONE]'*) break ;;
        esac
    done
    exec 3>&-
    local us=$((${EPOCHREALTIME/./} - ${start/./}))
    printf '%s\n  [%d pieces in %d ms]\n' "$answer" "$count" $((us / 1000))
}

pids=()
for question in "$@"; do
    ask "$question" &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    wait "$pid"
done
