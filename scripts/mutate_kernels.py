"""Do the tests notice when a kernel is wrong? `make kernels-mutate`

Breaks the Triton kernels one place at a time, in a copy: removes a mask, turns a sign, replaces -inf by 0, drops a
rescaling, rounds an accumulator to bfloat16. Runs the kernels' tests against each copy. Writes
benchmarks/results/kernels_mutation.md; exits 1 when the tests notice fewer than nine in ten.
"""

import argparse
import ast
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "carft_kernels"
SANITIZER = ROOT / "build" / "ttsem"
REPORT = ROOT / "benchmarks" / "results" / "kernels_mutation.md"
TRITON_TESTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/ops/test_triton_*.py"))
# those of them that reach a file's kernels
TESTS = {
    "_row_kernels.py": "token_logprob or policy or nan or without_weight",
    "_policy_kernels.py": "policy or nan or without_weight",
    "_matmul_kernels.py": "linear_logprob or infonce or policy",
    "policy_loss.py": "value_loss or without_weight",
    "value_pool.py": "value_pool",
    "masked_infonce.py": "infonce",
    "gae.py": "advantages or whiten",
    "lcs.py": "lcs",
}


def is_call(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def parsed(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


def without_mask(node: ast.AST) -> ast.AST | None:
    if is_call(node, "tl.load", "tl.store") and any(k.arg == "mask" for k in node.keywords):
        return ast.Call(node.func, node.args, [k for k in node.keywords if k.arg not in ("mask", "other")])
    return None


def turned_sign(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        return node.operand
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return ast.BinOp(node.left, ast.Add(), node.right)
    return None


def zero_for_infinity(node: ast.AST) -> ast.AST | None:
    return ast.Constant(0.0) if is_call(node, "float") and ast.unparse(node) == "float('-inf')" else None


def without_rescaling(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for factor, rest in ((node.left, node.right), (node.right, node.left)):
            text = ast.unparse(factor)
            if text in ("rescale", "powers") or text.startswith(("tl.exp2(top", "tl.exp(top", "tl.exp2(z")):
                return rest
    return None


def rounded_accumulator(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name):
        name = node.target.id
        if name.endswith("_ptr") or name == "out":
            return None
        value = parsed(f"({name} + ({ast.unparse(node.value)})).to(tl.bfloat16).to(tl.float32)")
        return ast.Assign([ast.Name(name, ast.Store())], value)
    if is_call(node, "tl.dot"):
        return parsed(f"{ast.unparse(node)}.to(tl.bfloat16).to(tl.float32)")
    return None


MUTATIONS = {
    "mask removed": without_mask,
    "sign turned": turned_sign,
    "-inf is 0": zero_for_infinity,
    "rescaling dropped": without_rescaling,
    "accumulator in bfloat16": rounded_accumulator,
}


@dataclass(frozen=True)
class Mutant:
    file: str
    function: str
    mutation: str
    line: int
    before: str
    after: str
    source: str  # of the whole file


class _ReplaceOne(ast.NodeTransformer):
    def __init__(self, target: ast.AST, replacement: ast.AST) -> None:
        self.target, self.replacement = target, replacement

    def visit(self, node: ast.AST) -> ast.AST:
        return self.replacement if node is self.target else self.generic_visit(node)


def mutants_of(path: Path, per_kind: int) -> Iterator[Mutant]:
    """The first and last `per_kind` / 2 places of each kind in each kernel."""
    source = path.read_text()
    functions = [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and is_kernel(n)]
    for function in functions:
        for kind, mutate in MUTATIONS.items():
            places = len(list(_places(ast.parse(source), function, mutate)))
            chosen = range(places)
            if places > per_kind:
                chosen = [*range(per_kind - per_kind // 2), *range(places - per_kind // 2, places)]
            for place in chosen:
                tree = ast.parse(source)
                node, replacement = list(_places(tree, function, mutate))[place]
                before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(replacement))
                changed = ast.fix_missing_locations(_ReplaceOne(node, replacement).visit(tree))
                yield Mutant(path.name, function, kind, node.lineno, before, after, ast.unparse(changed))


def is_kernel(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)


def _places(tree: ast.Module, function: str, mutate: object) -> Iterator[tuple[ast.AST, ast.AST]]:
    (body,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    for statement in body.body:
        for node in ast.walk(statement):
            replacement = mutate(node)  # type: ignore[operator]
            if replacement is not None:
                yield node, replacement


def noticed(mutant: Mutant, examples: int) -> bool:
    """Whether the tests fail: in the interpreter, or, where a mask is gone and nothing but foreign memory was read,
    under the sanitizer."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(KERNELS, Path(folder) / "carft_kernels", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "carft_kernels" / mutant.file).write_text(mutant.source)
        if not passes([folder], ["-m"], examples, TESTS[mutant.file]):
            return True
        if mutant.mutation != "mask removed" and mutant.function:
            return False
        sanitizer = ["-m", "ttsem.sanitize"]
        return not passes([folder, str(SANITIZER)], sanitizer, max(2, examples // 2), TESTS[mutant.file])


def passes(path: list[str], launcher: list[str], examples: int, tests: str) -> bool:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "CARFT_TEST_EXAMPLES": str(examples),
    }
    if len(launcher) > 1:
        environment |= {"TRITON_INTERPRET": "0", "CARFT_TEST_DEVICE": "cuda"}
    command = [sys.executable, *launcher, "pytest", "-x", "-q", "-p", "no:cacheprovider", *TRITON_TESTS]
    return (
        subprocess.run(
            [*command, "-k", tests], cwd=ROOT, env=environment, capture_output=True, timeout=900, check=False
        ).returncode
        == 0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", choices=sorted(TESTS), help="this file's kernels only; writes no report")
    parser.add_argument("--per-kind", type=int, default=2, help="places of each kind in each kernel (default 2)")
    parser.add_argument("--examples", type=int, default=8, help="generated examples a test (default 8)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    files = [arguments.file] if arguments.file else sorted(TESTS)
    for name in files:  # a test that fails anyway notices nothing
        untouched = Mutant(name, "", "", 0, "", "", (KERNELS / name).read_text())
        if noticed(untouched, arguments.examples):
            sys.exit(f"the tests of {name} fail on the kernels as they are")
    mutants = [m for name in files for m in mutants_of(KERNELS / name, arguments.per_kind)]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda m: noticed(m, arguments.examples), mutants))
    survivors = [m for m, seen in zip(mutants, results, strict=True) if not seen]
    for m in survivors:
        print(f"survived: {m.file}:{m.line} {m.function}, {m.mutation}: {m.before!r} -> {m.after!r}")
    share = sum(results) / len(results)
    print(f"{sum(results)} of {len(mutants)} noticed ({share:.1%})")
    if not arguments.file:
        REPORT.write_text(report(mutants, results))
    sys.exit(0 if share >= 0.9 else 1)


def report(mutants: list[Mutant], results: list[bool]) -> str:
    lines = [
        "# Broken kernels that the tests notice",
        "",
        f"{sum(results)} of {len(results)}, one change each, by `tests/ops/test_triton_*.py`: in Triton's interpreter,",
        "and under the sanitizer for removed masks, where the interpreter reads whatever lies behind a tensor.",
        "",
        "| kernel | " + " | ".join(MUTATIONS) + " |",
        "| --- |" + " --- |" * len(MUTATIONS),
    ]
    for function in dict.fromkeys(m.function for m in mutants):
        cells = []
        for kind in MUTATIONS:
            own = [
                seen for m, seen in zip(mutants, results, strict=True) if (m.function, m.mutation) == (function, kind)
            ]
            cells.append(f"{sum(own)}/{len(own)}" if own else "")
        lines.append(f"| {function} | " + " | ".join(cells) + " |")
    lines += ["", "Not noticed:", ""]
    for m, seen in zip(mutants, results, strict=True):
        if not seen:
            lines.append(f"- `{m.function}` ({m.file}:{m.line}), {m.mutation}: `{m.before}` to `{m.after}`")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
