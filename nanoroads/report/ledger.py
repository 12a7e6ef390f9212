"""The ledger of commands: what is finished, what it was made from, and whether it may be used again.

OUT/phases.json     {name: {"command", "seconds", "read", "made"}} of what is finished
OUT/started.json    {name: {"command", "read"}} of every command that was started

`read` has a hash of each result that the command has read, directly or through another; `made` has
one of each file that it has made. The rule is that of run/made_from.py: what we made and nobody has
changed is made again when what it was made from has changed; the rest is refused by name.
"""

from pathlib import Path
from typing import NamedTuple

from nanoroads.errors import InputError
from nanoroads.run.folder import RECORD, SAMPLES, SPEED
from nanoroads.run.made_from import (
    check_fields,
    check_unchanged,
    is_seconds,
    is_text_list,
    is_text_object,
    read_state,
    record_path,
    unchanged_record,
)
from nanoroads.weights.files import write_json
from nanoroads.weights.identity import of_file, of_value

# What our scripts write into a run's folder and its reward/, and read again. Nothing else there is looked
# at or deleted: it may be a user's.
RUN_FILES = ("config.json", "model.safetensors", "metrics.jsonl", "demos.jsonl", RECORD)
RUN_FILES += (SAMPLES, SPEED, "ref_logp.safetensors", "ref_logp_test.safetensors")

STARTED_FIELDS = {"command": is_text_list, "read": is_text_object}
FINISHED_FIELDS = {**STARTED_FIELDS, "seconds": is_seconds, "made": is_text_object}


class Phase(NamedTuple):
    """One command and what it waits for."""

    name: str  # the path of its result, by which the ledger knows it
    needs: list[str]  # what the command reads: names of other phases, and paths of files that are there
    command: list[str]  # ["train_sft.py", ...] or ["-m", MODULE, ...], --out PATH among its flags

    @property
    def result(self) -> Path:
        """The folder or file that the command makes."""
        return Path(self.command[self.command.index("--out") + 1])

    @property
    def results(self) -> list[Path]:
        """The result alone, or both files of a command that makes two."""
        paths = [self.result]
        if "--test-out" in self.command:
            paths.append(Path(self.command[self.command.index("--test-out") + 1]))
        return paths

    @property
    def resumes(self) -> bool:
        """Whether the command continues a killed run of its own: scripts do, modules start anew."""
        return self.command[0].endswith(".py")


class Ledger:
    """Both files of a folder `out`. Raises InputError for a damaged one."""

    def __init__(self, out: Path):
        self.out = out
        self.finished = read_entries(out / "phases.json", FINISHED_FIELDS)
        self.started = read_entries(out / "started.json", STARTED_FIELDS)

    def read_by(self, phase: Phase) -> dict[str, str]:
        """{name: hash} of all that the phase's command reads. The phases that it needs are finished."""
        read = {}
        for need in phase.needs:
            if need in self.finished:
                read.update(self.finished[need]["read"])
                read[need] = self.made_hash(need)
            else:
                read[need] = of_file(Path(need))
        return read

    def made_hash(self, name: str) -> str:
        """A hash of all files that a finished phase has made.

        Without the records of files and the speed of runs, which have the seconds that they took: what
        is made again to the same file is the same."""
        made = self.finished[name]["made"]
        timed = {str(record_path(Path(path))) for path in made}
        timed.update(path for path in made if Path(path).name == SPEED)
        return of_value({path: hash_then for path, hash_then in made.items() if path not in timed})

    def hashes(self, names: list[str]) -> dict[str, str]:
        """{name: hash of what it has made} of phases that are finished."""
        return {name: self.made_hash(name) for name in names}

    def check_made(self, phases: list[Phase]):
        """Raises InputError for a result that somebody has changed."""
        for phase in phases:
            made = self.finished.get(phase.name, {"made": {}})["made"]
            for path in result_paths(phase):
                if str(path) in made:
                    check_unchanged(path, made[str(path)])

    def is_done(self, phase: Phase) -> bool:
        """Whether the phase need not run again: its command and all that it read are the same.

        And what it made is there; `check_made` has seen that nobody changed it."""
        entry = self.finished.get(phase.name)
        if entry is None or entry["command"] != phase.command:
            return False
        return is_whole(entry) and entry["read"] == self.read_by(phase)

    def start(self, phase: Phase):
        """Make way for a phase that is not done, and enter it as started.

        Raises InputError where something lies in its way that may be somebody's work."""
        read = self.read_by(phase)
        entry = self.finished.get(phase.name)
        # If only its command is another one, the script decides: it knows which flags matter.
        script_decides = entry and phase.resumes and is_whole(entry) and entry["read"] == read
        if entry is None:
            self.check_begun(phase, read)
        elif not script_decides:
            delete_made(phase, entry)
            del self.finished[phase.name]
            self.write_finished()
        self.started[phase.name] = {"command": phase.command, "read": read}
        write_json(self.out / "started.json", self.started)

    def check_begun(self, phase, read):
        """Of a phase that never finished: raises InputError where its result is there and is not ours."""
        there = [path for path in phase.results if path.exists()]
        if not there:
            return
        begun = self.started.get(phase.name, {"read": read})
        for name, hash_now in read.items():
            if begun["read"].get(name) != hash_now:
                raise InputError(f"{there[0]}: was begun before {name} changed; delete it, and start again")
        if phase.resumes:  # a script looks into the folder itself, and resumes or refuses
            return
        for path in there:
            unchanged_record(path)
            path.unlink()

    def finish(self, phase: Phase, seconds: float) -> dict:
        """Enter a phase whose command has succeeded as finished, on disk too. Returns its entry."""
        made = files_made(phase)
        if not made:
            raise InputError(f"{phase.name}: its command has ended without a result")
        entry = {**self.started[phase.name], "seconds": seconds, "made": made}
        self.finished[phase.name] = entry
        self.write_finished()
        return entry

    def write_finished(self):
        write_json(self.out / "phases.json", self.finished)


def read_entries(path, fields):
    """{name: entry} in a file of the ledger, none where there is no such file. Raises InputError."""
    if not path.exists():
        return {}
    advice = "delete it and start again: a finished run is not trained again"
    entries = read_state(path, advice)
    for name, entry in entries.items():
        check_fields(entry, fields, path, advice, f"entry {name!r}")
    return entries


def result_paths(phase):
    """The paths of all files that a phase may make, be its result a file or a folder."""
    result = phase.result
    paths = []
    for path in phase.results:
        paths += [path, record_path(path)]
    for folder in (result, result / "reward"):
        paths += [folder / name for name in RUN_FILES]
    return paths


def files_made(phase):
    """{path: hash} of the files of a phase's result that are there."""
    return {str(path): of_file(path) for path in result_paths(phase) if path.is_file()}


def is_whole(entry):
    """Whether all files that a finished phase has made are still there."""
    return all(Path(path).exists() for path in entry["made"])


def delete_made(phase, entry):
    """Delete what a phase has made, as its entry says, and nothing that has changed since."""
    for path, hash_now in files_made(phase).items():
        if entry["made"].get(path) == hash_now:
            Path(path).unlink()
