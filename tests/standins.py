"""Stand-ins for tools of README's commands where a machine lacks them: just what those commands use, nothing else.

`python standins.py TOOL ARGUMENTS...`; anything they do not know ends with an error.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

#: README's filters for jq, and what they do to a record: the fields of a line, or None to leave it out.
FILTERS: dict[str, Callable[[dict], list | None]] = {
    'select(.status == "error") | [.source, .index, .messages[0].code] | @tsv': lambda record: (
        [record["source"], record["index"], record["messages"][0]["code"]] if record["status"] == "error" else None
    ),
    'select(.status != "error") | [.properties.gap.value, .name, .source] | @tsv': lambda record: (
        [record["properties"]["gap"]["value"], record["name"], record["source"]]
        if record["status"] != "error"
        else None
    ),
}


def install(folder: Path) -> list[str]:
    """Put the tools that this machine lacks into a folder; return their names."""
    folder.mkdir()
    missing = [name for name in TOOLS if shutil.which(name) is None]
    for name in missing:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n', encoding="utf-8")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return missing


def jq(arguments: list[str]) -> int:
    """`jq -r FILTER FILE` for the filters above."""
    option, text, path = arguments
    assert option == "-r"
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if (fields := FILTERS[text](json.loads(line))) is not None:
            print(*("" if field is None else field for field in fields), sep="\t")
    return 0


def parallel(arguments: list[str]) -> int:
    """`parallel -0 -k -j JOBS -n COUNT COMMAND`, with {} in the command: GNU parallel, output in order."""
    assert arguments[:2] == ["-0", "-k"]
    assert (arguments[2], arguments[4]) == ("-j", "-n")
    jobs, count, command = int(arguments[3]), int(arguments[5]), arguments[6:]
    inputs = [os.fsdecode(text) for text in sys.stdin.buffer.read().split(b"\0") if text]
    groups = [inputs[k : k + count] for k in range(0, len(inputs), count)]

    def run(group: list[str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(" ".join(command).replace("{}", shlex.join(group)), shell=True, stdout=subprocess.PIPE)

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(run, groups))
    for result in results:
        sys.stdout.buffer.write(result.stdout)
    return sum(result.returncode != 0 for result in results)


def sbatch(arguments: list[str]) -> int:
    """`sbatch --wait SCRIPT`: Slurm's array job, one task after the other; as Slurm does, refuses a missing `#!`."""
    option, path = arguments
    assert option == "--wait"
    script = Path(path).read_text(encoding="utf-8")
    assert script.startswith("#!")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script, re.MULTILINE))
    first, last = map(int, options["array"].split("-"))
    statuses = []
    for task in range(first, last + 1):
        variables = {
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_COUNT": str(last - first + 1),
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        }
        interpreter = script.splitlines()[0].removeprefix("#!").split()
        statuses.append(subprocess.run([*interpreter, path], env=os.environ | variables).returncode)
    return max(statuses)


def make(arguments: list[str]) -> int:
    """`make` for a Makefile with one target, whose sources come from patsubst and wildcard, and one pattern rule."""
    assert not arguments
    text = Path("Makefile").read_text(encoding="utf-8")
    goal = re.search(r"^\w+: \$\(patsubst %(\S+),%(\S+),\$\(wildcard (\S+)\)\)$", text, re.MULTILINE)
    rule = re.search(r"^%(\S+): %(\S+)\n\t(.*)\n", text, re.MULTILINE)
    assert goal is not None
    assert rule is not None
    assert (goal[1], goal[2]) == (rule[2], rule[1])
    for source in sorted(glob(goal[3])):
        target = source.removesuffix(rule[2]) + rule[1]
        command = rule[3].replace("$<", source).replace("$@", target).replace("$$", "$")
        if subprocess.run(command, shell=True).returncode != 0:
            return 2
    return 0


TOOLS = {"jq": jq, "make": make, "parallel": parallel, "sbatch": sbatch}

if __name__ == "__main__":
    sys.exit(TOOLS[sys.argv[1]](sys.argv[2:]))
