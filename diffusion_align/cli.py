"""The `diffusion-align` command. Nothing heavy is imported until the arguments are known to be good."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from diffusion_align.options import VERBS, UsageError, build_parser, parse, preset_names, resolve, unknown
from diffusion_align.options.reading.paths import require_outputs
from diffusion_align.system.consoles import tolerant_output
from diffusion_align.system.printable import printable

PROG = "diffusion-align"
MEMORY_CURE = (
    "the three cheapest remedies: --gradient_checkpointing; --mixed_precision bf16; fewer pictures at a time "
    "(halve --train_batch_size and double --gradient_accumulation_steps; online: halve --sample_chunk, or --group_size)"
)
TIMEOUT_CURE = "if that process is only slow, raise --process_timeout"
TRACEBACK = " (--traceback shows where)"
OTHER_VERBS = {
    "presets ls": "list the presets",
    "presets show": "print a preset, with the unit and the source of each number: presets show METHOD/NAME",
    "presets check": "what a preset names, its licences, and what of it is here: presets check [METHOD/NAME]",
    "presets cp": "copy a preset, to edit and use with --config: presets cp METHOD/NAME [FILE]",
    "reward ls": "list the rewards: what each measures, its unit, licence, weights, and what it needs",
    "doctor": "versions, devices and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 the work failed, 2 the command line is wrong, 128 + n stopped by signal n (130: Ctrl-C).
    """
    with tolerant_output() as output:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        output.flush()
        if output.refused is None:
            return code
        _complain(f"some output of this command is lost: {output.refused.strerror}; make room for its output")
        return code or 1


def _main(argv: list[str]) -> int:
    traceback = os.environ.get("DIFFUSION_ALIGN_TRACEBACK", "0") not in ("", "0") or "--traceback" in argv
    try:
        return _run(argv)
    except KeyboardInterrupt as interrupt:
        # The exception of a command that can be continued says how.
        _complain(f"interrupted{'; ' + str(interrupt) if str(interrupt) else ''}")
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    except SystemExit as error:  # of a library or a reward: whatever its code, the command did not finish
        _complain(f"code that this command ran called exit({error.code!r}); the command did not finish")
        return 1
    except UsageError as error:
        if traceback:
            raise
        _complain(str(error))
        return 2
    except Exception as error:
        if traceback:
            raise
        # The package raises its own classes, or these, for what a user can correct; all others are unexpected.
        ours = type(error).__module__.startswith("diffusion_align.")
        cures = {"out of memory": MEMORY_CURE, "has not moved since step": TIMEOUT_CURE}
        cure = next((cure for sign, cure in cures.items() if sign in str(error)), "")
        if cure:  # for this process, or another one that the error names
            _complain(f"{_one_line(error)}; {cure}")
        elif ours or isinstance(error, ValueError | OSError | ImportError | NotImplementedError):
            _complain(_one_line(error) + (TRACEBACK if getattr(error, "unexpected", False) else ""))
        else:
            _complain(f"unexpected {type(error).__name__}: {_one_line(error)}{TRACEBACK}")
        return 1


def _run(argv: list[str]) -> int:
    words, rest = split_verb(argv)
    if words == "--version":
        from importlib.metadata import version

        print(f"{PROG} {version('diffusion_align')}")
        return 0
    if words in VERBS:
        return _run_verb(words, rest)
    if words in OTHER_VERBS and not {"-h", "--help"} & set(rest):
        from diffusion_align.commands import doctor, presets
        from diffusion_align.commands.reward.ls import reward_ls

        rest = [word for word in rest if word != "--traceback"]
        other = {"doctor": doctor.doctor, "reward ls": reward_ls}
        return other[words](rest) if words in other else presets.presets(words.split()[1], rest)
    print(overview(words))
    return 0


def _run_verb(words: str, argv: list[str]) -> int:
    verb = VERBS[words]
    if {"-h", "--help"} & set(argv):
        parser = build_parser(verb.options, f"{PROG} {words}", verb.about, verb.positional)
        names = preset_names(words)
        print(parser.format_help() + (f"\npresets: {', '.join(names)}" if names else ""))
        return 0
    parsed = parse(verb.options, argv, words, verb.positional)
    resolved = resolve(verb.options, words, preset=parsed.preset, config=parsed.config, settings=parsed.settings)
    verb.check(resolved.options)
    require_outputs(resolved.options)
    for note in [*resolved.notes(), *verb.notes(resolved.options, resolved.given())]:
        _complain(note, "note")
    from diffusion_align.commands.early import require_possible

    require_possible(resolved.options)
    if parsed.dry_run:
        return verb.dry_run(resolved.options)
    if hasattr(resolved.options, "threads"):
        from diffusion_align.commands import threads

        threads.record_usage()
    return verb.start(resolved.options)


def split_verb(argv: list[str]) -> tuple[str, list[str]]:
    """The verb, of one or two words, and the rest. For a group alone (`train`), or nothing, `_run` prints an overview.

    Raises:
        UsageError: no such verb, with the nearest one.
    """
    known = [*VERBS, *OTHER_VERBS]
    groups = {words.split()[0] for words in known if " " in words}
    if not argv or argv[0] in ("-h", "--help", "help", "--traceback"):
        return "", []
    if argv[0] == "--version":
        return "--version", []
    first = argv[0]
    if first in groups:
        if len(argv) == 1 or argv[1] in ("-h", "--help"):
            return first, []
        seconds = [words.split()[1] for words in known if words.startswith(first + " ")]
        if argv[1] not in seconds:
            raise unknown(f"word after {first}:", argv[1], seconds, otherwise=f"there is {first} {', '.join(seconds)}")
        return f"{first} {argv[1]}", argv[2:]
    if first not in known:
        firsts = sorted({words.split()[0] for words in known})
        raise unknown("command", first, firsts, otherwise=f"there are {', '.join(firsts)}")
    return first, argv[1:]


def overview(group: str = "") -> str:
    """The list of all verbs, or of those in one group, for the terminal."""
    abouts = {words: verb.about for words, verb in VERBS.items()} | OTHER_VERBS
    shown = {words: about for words, about in abouts.items() if words.startswith(group)}
    width = max(map(len, shown))
    lines = [f"usage: {PROG} {group or 'COMMAND'} ...", ""]
    lines += [f"  {words:{width}}  {about}" for words, about in shown.items()]
    if not group:
        lines += ["", f"{PROG} COMMAND --help shows its options. Errors are one line; --traceback shows the rest."]
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    """The message of an error in one line; its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def _complain(message: str, kind: str = "error") -> None:
    print(f"{PROG}: {kind}: {printable(message)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
