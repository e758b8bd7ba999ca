#!/bin/sh
# Compress files by a command, and compare with what a shell loop makes of them.
#
#     sh examples/exec_tool.sh [DIRECTORY]      without it: in a temporary directory; ringpool is on PATH
#
#     DIRECTORY/in/...  --ringpool run --exec 'gzip ...'-->  DIRECTORY/out/....gz
#                       --for file in ...; do gzip ...---->  DIRECTORY/loop/....gz
#
# Names have blanks, quotes, dollars and a leading dash: a command gets each as one word. Exits with 1 if the two
# directories differ.
set -eu

case "$#${1-}" in
0 | 1[!-]*) ;;
*)
    echo "usage: sh exec_tool.sh [DIRECTORY]" >&2
    exit 2
    ;;
esac

if [ $# -gt 0 ]; then
    mkdir -p "$1"
    place=$1
else
    place=$(mktemp -d)
    trap 'cd /; rm -rf "$place"' EXIT
    trap 'exit 1' HUP INT TERM
fi
cd "$place"

mkdir -p in loop
for i in 00 01 02 03 04 05 06 07 08 09; do
    for name in plain 'with blanks' "o'clock" 'say "so"' '$HOME' '-dash' 'semi;colon'; do
        seq 1 "2$i" > "in/$name $i.txt"
    done
done

ringpool run --exec 'gzip -9nc {src} > {dst}' in --out 'out/{relpath}.gz' --durability data

for file in in/*.txt; do
    gzip -9nc "$file" > "loop/${file#in/}.gz"
done

diff -r --exclude=.ringpool out loop
echo "$(ls loop | wc -l) files are the same, byte for byte"
