"""No loop turns aside on what only its own process knows: read off the code, and tried with two processes.

The rule: within the loops of `run_steps` and `run_rounds` whatever leaves (continue, break, return, raise) and whatever
makes processes talk to one another stands under conditions that are alike on all: settings, where the run is in its
stream, and what `agree` has decided. An exception ends the process and with it the job, so it is none of them.
"""

import ast
from pathlib import Path

import pytest
import torch
from helpers_train import MemoryPairs, make_run
from stress.jobs import launch

from diffusion_align import train

HOME = Path(train.__file__).parent
LOOPS = [("steps", "run_steps"), ("rounds", "run_rounds"), ("rounds", "_learn"), ("collect", "draw_round")]
# Every process gets the same from these, as they end in a collective.
AGREED = {
    "on_any_rank",
    "max_over_ranks",
    "values_by_rank",
    "steps_of",
    "sum_over_ranks",
    "_gather",
    "_surveyed",
    "update",
}
TALKS = AGREED | {
    "draw_round",
    "_learn",
    "gather",
    "reduce",
    "wait_for_everyone",
    "gather_object",
    "barrier",
    "require_equal_ranks",
    "_fill_gradients",
}
# Settings, and numbers that every process computes alike from them; `blocks` are as many on each.
ALIKE = {"run", "sizes", "check_first", "fresh", "method", "number", "passes", "steps", "last", "end", "blocks", "size"}
LOCAL = {"run.round", "run.stop_requested", "run.accelerator"}  # of a run: what each process has for itself
PURE = {"len", "int", "range", "prefetch", "_size"}
LEAVES = (ast.Continue, ast.Break, ast.Return, ast.Raise)


def strays(source, function):
    """Where in the function's loops one process could leave the others, or talk to nobody: a line for each."""
    nodes = ast.walk(ast.parse(source))
    found = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == function)
    settings = {argument.arg for argument in found.args.kwonlyargs}
    known = settings | ALIKE | {"progress"} | agreed_names(found)
    loops = [node for node in found.body if isinstance(node, ast.While | ast.For)]
    assert loops
    return [line for loop in loops for line in walk(ast.Module([loop], []), known, [])]


def agreed_names(function):
    """Names that the answer of something agreed is given to."""
    return {
        name.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and called(root(node.value)) in AGREED | {"int"}
        for target in node.targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
        and (called(root(node.value)) != "int" or called(root(node.value).args[0]) in AGREED)
    }


def root(value):
    """The call under an index: `anywhere(...)[0]`."""
    return value.value if isinstance(value, ast.Subscript) else value


def called(node):
    return getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""


def walk(node, known, local):
    """`local`: what the conditions around a node hang on that only this process knows."""
    lines = []
    for child in ast.iter_child_nodes(node):
        here = local
        if isinstance(child, ast.If | ast.While | ast.IfExp):
            here = local + unknown(child.test, known)
        elif isinstance(child, ast.BoolOp):  # what comes later may not be asked at all
            here = local + [what for part in child.values[:-1] for what in unknown(part, known)]
        elif isinstance(child, ast.For):
            here = local + unknown(child.iter, known)
        elif isinstance(child, ast.ExceptHandler):
            here = [*local, "an exception"]
        if local and (isinstance(child, LEAVES) or called(child) in TALKS):
            lines.append(f"line {child.lineno} hangs on {', '.join(local)}")
        lines += walk(child, known, here)
    return lines


def unknown(test, known):
    """What of a condition may differ between processes."""
    if called(root(test)) in AGREED:
        return []
    if isinstance(test, ast.Name):
        return [] if test.id in known | PURE else [test.id]
    if isinstance(test, ast.Call) and called(test) not in PURE:
        return [ast.unparse(test)]
    if isinstance(test, ast.Attribute) and ast.unparse(test) in LOCAL:
        return [ast.unparse(test)]
    if ast.unparse(test) in ("round is None", "found is None"):  # alike, as `progress.in_round` is, which they go with
        return []
    return [what for part in ast.iter_child_nodes(test) if isinstance(part, ast.expr) for what in unknown(part, known)]


@pytest.mark.parametrize(("room", "function"), LOOPS)
def test_loops_branch_only_on_values_equal_on_all_ranks(room, function):
    assert strays((HOME / f"{room}.py").read_text(), function) == []


BAD = [
    # NeMo Automodel#2468: a process without labels went on to the next batch, and the others waited in the backward.
    ("steps", "run_steps", "columns = _gather", "if not mine[0]: continue"),
    ("steps", "run_steps", "(failed,) = on_any_rank", "if by_micro_batch is None: continue"),
    ("steps", "run_steps", "columns = _gather", "if not torch.isfinite(by_micro_batch[0]['loss']).all(): return"),
    ("steps", "run_steps", "outcome = update", "if len(by_micro_batch) == 1: break"),
    ("steps", "run_steps", "outcome = update", "if accelerator.process_index and on_any_rank(accelerator, True): pass"),
    ("steps", "run_steps", "outcome = update", "if run.accelerator.process_index: break"),
    ("rounds", "run_rounds", "items = sum_over_ranks", "if not chunks: continue"),
    ("rounds", "run_rounds", "columns = _gather", "if not learned: break"),
    ("rounds", "run_rounds", "if items:", "if method.items(chunks[0]): _gather(learned, accelerator)"),
    ("rounds", "run_rounds", "drawn = _gather", "if not round.chunks[0]: continue"),
    ("rounds", "_learn", "smaller =", "if not smaller: return [], progress"),
    ("rounds", "_learn", "smaller =", "try: free()\n@except RuntimeError: continue"),
    ("collect", "draw_round", "smallest =", "if run.stop_requested(): return None"),
    ("collect", "draw_round", "smallest =", "for chunk in drawn: on_any_rank(accelerator, True)"),
]


@pytest.mark.parametrize(("room", "function", "before", "added"), BAD)
def test_the_check_finds_branches_of_a_single_rank(room, function, before, added):
    source = (HOME / f"{room}.py").read_text()
    (line,) = [line for line in source.splitlines() if line.strip().startswith(before) and line.startswith(" " * 8)]
    indent = line[: len(line) - len(line.lstrip())]
    new = "".join(f"{indent}{part}\n" for part in added.split("\n@")) + line
    assert strays(source.replace(line, new), function) != []


def ran_out(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("fault", ["not finite", "no memory"])
def test_a_bad_batch_on_one_rank_blocks_no_other(fault, tmp_path):
    """Step 3 of process 1: both skip it, or both halve; and both come to the end, within the launcher's time."""

    def work(rank):
        run = make_run(max_steps=5)
        records, loss = [], run.settings["loss"]

        def broken(pairs):
            if rank == 1 and len(records) == 2:
                if fault == "not finite":
                    return loss(pairs) * float("nan")
                if pairs.errors.shape[1] > 1:
                    ran_out()
            return loss(pairs)

        for record in run.steps(loss=broken, cache=MemoryPairs(20)):
            records.append(record)
        updated = [record.updated for record in records]
        halvings = [record.progress.halvings for record in records]
        wanted = ([True, True, False, True, True], [0] * 5) if fault == "not finite" else ([True] * 5, [0, 0, 1, 1, 1])
        return int((updated, halvings) != wanted)

    ended = launch(2, work, tmp_path)
    assert ended.codes == [0, 0] and not ended.hung, ended.text
