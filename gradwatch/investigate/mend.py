"""The smallest mend of a line of the user's code, as a diff: only where the line is found and holds the operator, and once.

What is written there is read with `ast`; of the line everything is kept but the operator's argument. Nothing is invented: where two
places of the line could be meant, or none, there is no mend.
"""

from __future__ import annotations

import ast
import functools
import linecache
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import CodeType
from typing import NamedTuple

EPS = "1e-8"
"""What is added below roots and logs: above float32's smallest normal number by 30 decades and below what a loss would notice."""

SMALL = 1e-4
"""Largest number below which `EPS` is no small part of what is there."""

_LONGEST = 20
"""Lines of a statement that is looked at."""


Span = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Culprit:
    """What is known of the operator.

    Attributes:
        op: its name without "aten::".
        backward: it is its derivative that is bad.
        low, high: smallest and largest number of its last input that is a floating tensor; NaN: not known.
        tensors: how many tensors it was given.
        counts: the last of them holds integers.
        infinite: what it gives, or its derivative, is Inf somewhere, and not NaN alone: of a division, something that is not 0 was divided
            by 0; of a derivative, what it gives is used there.
        empty: it was given nothing.
        half: in half precision, where 1e-8 is 0, 1e-6 away from 1 is 1 and exp(80) is Inf.
        roots: names that a root was assigned to, in the file.
        code: of the function that the line stands in; None: not known.
        span: what of the source was running: first line, column, last line, column; None: not known, and all of the line could be meant.
    """

    op: str
    backward: bool = False
    low: float = float("nan")
    high: float = float("nan")
    tensors: int = 1
    counts: bool = False
    infinite: bool = False
    empty: bool = False
    half: bool = False
    roots: frozenset[str] = frozenset()
    code: CodeType | None = None
    span: Span | None = None


class Mend(NamedTuple):
    """A mend.

    Attributes:
        diff: lines that begin with "- " and "+ "; "" for none.
        trap: the operator stands in a branch of a `torch.where`, and the diff is the double `where`.
    """

    diff: str = ""
    trap: bool = False


NONE = Mend()


def mend(file: str, line: int, culprit: Culprit) -> Mend:
    """The smallest mend of a line."""
    op = culprit.op.strip("_")
    if (culprit.half and op != "to_copy" and "softmax" not in op) or not is_as_it_was(file, culprit.code):
        return NONE
    found = _statement(file, line, culprit.span)
    if found is None:
        return NONE
    source, first, tree = found
    if culprit.span is not None:
        start, column, end, behind = culprit.span
        culprit = replace(culprit, span=(start - first + 1, column, end - first + 1, behind))
    if op in ("div", "reciprocal", "true_divide"):
        culprit = replace(culprit, roots=_named_roots(file))
    make = _MENDS.get(op)
    if make is None or (0 < culprit.high < SMALL and (make in (_root, _division) or op.startswith("log"))):
        return NONE
    edits = [edit for node in _meant(tree, line - first + 1, culprit) for edit in make(node, culprit, source)]
    traps = _trap(tree, culprit, source) if culprit.backward and not culprit.infinite else []
    edits = list(dict.fromkeys(traps or edits)) if _is_alone(tree, culprit) else []
    diff = _diff(source, edits[0]) if len(edits) == 1 else None
    return Mend(diff, bool(traps)) if diff and _parses(source, edits[0]) else NONE


def _is_alone(tree: ast.AST, culprit: Culprit) -> bool:
    """What ran stands once in the statement: to mend one of two that are the same mends nothing."""
    if culprit.span is None:
        return True
    texts = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.expr) and _is_running(node, culprit.span)]
    return not texts or sum(isinstance(node, ast.expr) and ast.unparse(node) == texts[0] for node in ast.walk(tree)) == 1


@functools.lru_cache(maxsize=16)
def _named_roots(file: str) -> frozenset[str]:
    """Names that something with a root in it is assigned to somewhere in a file: what is divided by them is mended there."""
    names: set[str] = set()
    for node in ast.walk(ast.parse("".join(linecache.getlines(file)))):
        if isinstance(node, ast.Assign) and any(_is_a_root(inner) for inner in ast.walk(node.value)):
            names.update(ast.unparse(target) for target in node.targets if isinstance(target, (ast.Name, ast.Attribute)))
    return frozenset(names)


def _is_a_root(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Pow) and _is_root(node.right)
    if not isinstance(node, ast.Call):
        return False
    return _called(node) == "sqrt" or (_called(node) == "pow" and bool(node.args) and _is_root(node.args[-1]))


def line_of(file: str, line: int, code: CodeType | None = None) -> str:
    """A line as it stands, "" where it is not to be had, or has been edited since the code runs."""
    return linecache.getline(file, line).strip() if is_as_it_was(file, code) else ""


def is_as_it_was(file: str, code: CodeType | None) -> bool:
    """Whether a file still holds the function that runs, where it did: the compiled one is the same."""
    if code is None:
        return True
    linecache.checkcache(file)
    lines = linecache.getlines(file)
    if not lines:
        return False
    try:
        todo: list[CodeType] = [compile("".join(lines), file, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError, RecursionError):
        return False
    while todo:
        each = todo.pop()
        if (each.co_name, each.co_firstlineno, each.co_code) == (code.co_name, code.co_firstlineno, code.co_code):
            return True
        todo += [constant for constant in each.co_consts if isinstance(constant, CodeType)]
    return False


_NEED_IT = frozenset(
    (
        "deepcopy",
        "copy",
        "from_dlpack",
        "set_",
        "histc",
        "dumps",
        "save",
        "append",
        "extend",
        "asarray",
        "array",
        "Parameter",
    )
)
"""Calls that do not take what has a graph, or keep it, so that a graph would grow from step to step."""


def _must_stay(tree: ast.AST) -> bool:
    """A statement keeps what it makes for later, or gives it to something that takes none that has a graph."""
    targets = (
        tree.targets if isinstance(tree, ast.Assign) else [tree.target] if isinstance(tree, (ast.AugAssign, ast.AnnAssign)) else []
    )
    if any(isinstance(inner, ast.Attribute) for target in targets for inner in ast.walk(target)):
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(_called(call) in _NEED_IT or any(word.arg == "out" for word in call.keywords) for call in calls)


def removal(file: str, line: int, names: tuple[str, ...], code: CodeType | None = None) -> str | None:
    """A diff that takes a call out: `F.softmax(x, dim=1)` becomes `x`, `x.detach()` becomes `x`."""
    if not is_as_it_was(file, code):
        return None
    found = _statement(file, line)
    if found is None:
        return None
    source, first, tree = found
    edits = []
    if {"detach", "data"} & set(names) and _must_stay(tree):
        return None
    for node in _on_line(tree, line - first + 1):
        if isinstance(node, ast.Call) and _called(node) in names:
            inner = _subject(node)
            if inner is not None:
                edits.append(Edit(_span(node), _text(source, inner)))
        elif isinstance(node, ast.Attribute) and node.attr in names and "data" in names:
            edits.append(Edit(_span(node), _text(source, node.value)))
    return _diff(source, edits[0]) if len(edits) == 1 else None


# -- the source --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Edit:
    """What stands in a span of the source, counted from 1, (first line, column, last line, column), becomes something else."""

    span: Span
    text: str


def _statement(file: str, line: int, span: Span | None = None) -> tuple[list[str], int, ast.AST] | None:
    """The lines of the smallest statement around a line, or around what runs of it, the number of the first of them, and its tree."""
    lines = linecache.getlines(file)
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError, RecursionError):
        return None
    imported: set[str] = set()
    best: ast.stmt | None = None
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or node.lineno):
            continue
        if (span is None or _holds(node, span)) and (best is None or node.lineno >= best.lineno):
            best = node
    if best is None or (best.end_lineno or best.lineno) - best.lineno >= _LONGEST or hasattr(best, "body"):
        return None
    for node in ast.walk(best):
        if isinstance(node, ast.Name) and node.id in imported:
            node.imported = True  # type: ignore[attr-defined]
    first = best.lineno
    chosen = lines[first - 1 : best.end_lineno]
    ast.increment_lineno(best, 1 - first)
    return [text.rstrip("\n") for text in chosen], first, best


def _holds(node: ast.stmt, span: Span) -> bool:
    line, start, last, end = span
    return (node.lineno, node.col_offset) <= (line, start) and (last, end) <= (node.end_lineno or 0, node.end_col_offset or 0)


def _meant(tree: ast.AST, line: int, culprit: Culprit) -> Iterator[ast.expr | ast.AugAssign]:
    """What may have run the operator: what was running, and where that is not known, all that reaches over its line."""
    if culprit.span is None:
        yield from _on_line(tree, line)
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.expr, ast.AugAssign)) and _is_running(node, culprit.span):
            yield node
            if isinstance(node, ast.Call) and culprit.op.strip("_") == "to_copy":
                yield from (*node.args, *(keyword.value for keyword in node.keywords))


def _is_running(node: ast.expr | ast.AugAssign, span: Span) -> bool:
    if _span(node) == span:
        return True
    # Of a method in a chain over several lines, what runs begins with its name.
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    name, end = node.func, _span(node)[2:]
    return span == (name.end_lineno, (name.end_col_offset or 0) - len(name.attr.encode()), *end)


def _on_line(tree: ast.AST, line: int) -> Iterator[ast.expr]:
    """Expressions of a statement that reach over a line of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and node.lineno <= line <= (node.end_lineno or node.lineno):
            yield node


def _span(node: ast.expr | ast.AugAssign) -> Span:
    return node.lineno, node.col_offset, node.end_lineno or node.lineno, node.end_col_offset or node.col_offset


def _operand(source: list[str], node: ast.expr) -> Span:
    """The span of what a method is called on or an operator works on, with the parentheses around it."""
    first, start, last, end = _span(node)
    head, tail = source[first - 1].encode()[:start].decode(), source[last - 1].encode()[end:].decode()
    return (first, start - 1, last, end + 1) if head.endswith("(") and tail.startswith(")") else (first, start, last, end)


def _text(source: list[str], node: ast.expr) -> str:
    return ast.get_source_segment("\n".join(source), node) or ast.unparse(node)


def _edited(source: list[str], edit: Edit) -> list[str]:
    """All lines, with the edit made."""
    first, start, last, end = edit.span
    head, tail = source[first - 1].encode()[:start].decode(), source[last - 1].encode()[end:].decode()
    return [*source[: first - 1], *(head + edit.text + tail).split("\n"), *source[last:]]


def _parses(source: list[str], edit: Edit) -> bool:
    try:
        ast.parse("def f():\n" + textwrap.indent(textwrap.dedent("\n".join(_edited(source, edit))), " "))
    except SyntaxError:
        return False
    return True


def _diff(source: list[str], edit: Edit) -> str | None:
    """The lines that change, before and after."""
    first, start, last, end = edit.span
    before = source[first - 1 : last]
    # Columns count bytes.
    head, tail = before[0].encode()[:start].decode(), before[-1].encode()[end:].decode()
    after = (head + edit.text + tail).split("\n")
    if before == after:
        return None
    indent = min(len(text) - len(text.lstrip()) for text in (*before, *after) if text.strip())
    return "\n".join([f"- {text[indent:]}" for text in before] + [f"+ {text[indent:]}" for text in after])


# -- what is called ----------------------------------------------------------------------------------------------------------------


def _called(node: ast.Call) -> str:
    """The last name of what is called: "log" of `torch.log(x)` and of `x.log()`."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return "" if isinstance(function.value, ast.Name) and function.value.id in _NO_TENSORS else function.attr
    return function.id if isinstance(function, ast.Name) else ""


_NO_TENSORS = frozenset({"math", "np", "numpy"})
_PACKAGES = frozenset({"torch", "F", "functional", "nn", "special", "linalg"})


def _subject(node: ast.Call) -> ast.expr | None:
    """What an operator is called on: the first argument of a function, the object of a method."""
    function = node.func
    if isinstance(function, ast.Attribute) and not _is_package(function.value):
        return function.value
    if node.args and not isinstance(node.args[0], (ast.Starred, ast.Constant)):
        return node.args[0]
    return None


def _is_package(node: ast.expr) -> bool:
    """A function of it is no method of a tensor; nor is a module that `self` holds."""
    if isinstance(node, ast.Name) and (node.id == "self" or getattr(node, "imported", False)):
        return True
    return (isinstance(node, ast.Name) and node.id in _PACKAGES) or (isinstance(node, ast.Attribute) and node.attr in _PACKAGES)


def _is_method(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and not _is_package(node.func.value)


def _closed(text: str, node: ast.expr) -> str:
    """In parentheses where something can be called on it only then."""
    return text if isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript)) else f"({text})"


# -- mends -------------------------------------------------------------------------------------------------------------------------

_Make = Callable[[ast.expr | ast.AugAssign, Culprit, list[str]], Iterator[Edit]]


def _argument(names: tuple[str, ...], new: Callable[[str, ast.expr, bool, Culprit], str]) -> _Make:
    """A mend of the argument of a call."""

    def make(node: ast.expr | ast.AugAssign, culprit: Culprit, source: list[str]) -> Iterator[Edit]:
        if isinstance(node, ast.Call) and _called(node) in names:
            inner = _subject(node)
            in_place = _called(node).endswith("_") and _is_method(node)  # it would change what is made of it instead
            if inner is not None and not in_place:
                span = _operand(source, inner) if _is_method(node) else _span(inner)
                yield Edit(span, new(_text(source, inner), inner, _is_method(node), culprit))

    return make


def _clamped(limits: str) -> Callable[[str, ast.expr, bool, Culprit], str]:
    return lambda text, node, method, culprit: f"{_closed(text, node)}.{limits}"


def _plus_eps(text: str, node: ast.expr, method: bool, culprit: Culprit) -> str:
    if culprit.low < 0:
        return f"{_closed(text, node)}.clamp_min({EPS})"
    added = f"{_summand(text, node)} + {EPS}"
    return f"({added})" if method else added


def _summand(text: str, node: ast.expr) -> str:
    """In parentheses where a plus behind it would take part of it only."""
    return f"({text})" if isinstance(node, (ast.Compare, ast.BoolOp, ast.IfExp, ast.Lambda, ast.NamedExpr)) else text


def _root(node: ast.expr | ast.AugAssign, culprit: Culprit, source: list[str]) -> Iterator[Edit]:
    base = node.left if isinstance(node, ast.BinOp) else _subject(node) if isinstance(node, ast.Call) else None
    if base is not None and _is_a_root(base):
        return  # what is below it is to be mended
    if culprit.op.strip("_") != "pow":
        yield from _argument(("sqrt", "sqrt_", "rsqrt"), _plus_eps)(node, culprit, source)
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Pow)
        and _is_root(node.right)
        and not isinstance(node.left, ast.Constant)
    ):
        inner, text = node.left, _text(source, node.left)
        if culprit.low < 0:
            yield Edit(_operand(source, inner), f"{_closed(text, inner)}.clamp_min({EPS})")
        else:
            yield Edit(_operand(source, inner), f"({_summand(text, inner)} + {EPS})")
    if isinstance(node, ast.Call) and _called(node) in ("pow", "pow_") and node.args and _is_root(node.args[-1]):
        yield from _argument(("pow", "pow_"), _plus_eps)(node, culprit, source)


def _is_root(exponent: ast.expr) -> bool:
    """A number between -1 and 1: what is larger has a derivative at 0, 1e-8 to the power of less is no mend, and what is no number is not
    known."""
    try:
        value = ast.literal_eval(exponent)
    except (ValueError, TypeError, SyntaxError):
        return False
    return isinstance(value, (int, float)) and -1 < value < 1


def _division(node: ast.expr | ast.AugAssign, culprit: Culprit, source: list[str]) -> Iterator[Edit]:
    divisor = _divisor(node)
    if divisor is None:
        return
    if any(_is_a_root(inner) for inner in ast.walk(divisor)):
        yield from _roots(divisor, source)  # a clamp behind a root of 0 leaves its derivative infinite
        return
    if any(ast.unparse(inner) in culprit.roots for inner in ast.walk(divisor) if isinstance(inner, (ast.Name, ast.Attribute))):
        return
    text, span = _text(source, divisor), _span(divisor) if isinstance(node, ast.Call) else _operand(source, divisor)
    if culprit.counts:
        yield Edit(span, f"{_closed(text, divisor)}.clamp(min=1)")
    elif culprit.tensors < 2 and culprit.op.strip("_") != "reciprocal":
        if isinstance(divisor, (ast.Name, ast.Attribute, ast.Call)):
            yield Edit(span, f"max({text}, {EPS})")
    elif culprit.low >= 0 and not culprit.infinite:  # 1e-8 below a number that is not 0 is no mend
        yield Edit(span, f"{_closed(text, divisor)}.clamp_min({EPS})")


def _divisor(node: ast.AST) -> ast.expr | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return node.right
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div):
        return node.value
    if isinstance(node, ast.Call) and _called(node) in ("div", "div_", "divide", "divide_", "true_divide"):
        arguments = node.args[0 if _is_method(node) else 1 :]
        return arguments[0] if arguments else None
    return _subject(node) if isinstance(node, ast.Call) and _called(node) == "reciprocal" else None


def _with_keyword(text: str, node: ast.Call, keyword: str) -> str:
    inside = text[:-1].rstrip().removesuffix(",")
    return f"{inside}, {keyword})" if node.args or node.keywords else f"{inside}{keyword})"


def _roots(node: ast.expr, source: list[str]) -> Iterator[Edit]:
    """An eps inside, where an expression is a root, or a multiple or another view of one."""
    if isinstance(node, ast.Subscript):
        yield from _roots(node.value, source)
    elif isinstance(node, ast.Call) and _called(node) in _VIEWS:
        inner = _subject(node)
        yield from _roots(inner, source) if inner is not None else ()
    elif isinstance(node, ast.Call) and _called(node) == "sqrt":
        yield from _argument(("sqrt",), _plus_eps)(node, Culprit("sqrt", backward=True), source)
    elif _is_a_root(node):
        yield from _root(node, Culprit("pow", backward=True), source)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        yield from _roots(node.left, source)
        yield from _roots(node.right, source)


_VIEWS = ("unsqueeze", "squeeze", "view", "reshape", "expand", "expand_as", "view_as", "repeat", "t", "transpose", "permute")


def _variance(node: ast.expr | ast.AugAssign, culprit: Culprit, source: list[str]) -> Iterator[Edit]:
    if isinstance(node, ast.Call) and _called(node) in ("var", "std", "var_mean", "std_mean"):
        if {keyword.arg for keyword in node.keywords} & {"unbiased", "correction"} or culprit.empty:
            return
        text = _text(source, node)
        if "\n" not in text and len(node.args) <= (1 if _is_method(node) else 2):
            yield Edit(_span(node), _with_keyword(text, node, "correction=0"))


def _to_half(node: ast.expr | ast.AugAssign, culprit: Culprit, source: list[str]) -> Iterator[Edit]:
    if isinstance(node, ast.Call) and _called(node) == "half" and isinstance(node.func, ast.Attribute):
        yield Edit(_span(node), f"{_text(source, node.func.value)}.bfloat16()")
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.float16", "torch.half"):
        yield Edit(_span(node), "torch.bfloat16")


def _mask(node: ast.expr | ast.AugAssign, culprit: Culprit, source: list[str]) -> Iterator[Edit]:
    """A mask of -inf becomes one of the lowest number: a row that is masked throughout is then uniform, and no NaN."""
    if not (isinstance(node, ast.Call) and _called(node) in ("masked_fill", "masked_fill_") and len(node.args) >= 2):
        return
    value, masked = node.args[-1], _subject(node)
    if ast.unparse(value).replace(" ", "") not in _MINUS_INF or masked is None:
        return
    text = _text(source, masked)
    if isinstance(masked, (ast.Name, ast.Attribute)):
        yield Edit(_span(value), f"torch.finfo({text}.dtype).min")


_MINUS_INF = frozenset({"float('-inf')", "-torch.inf", "-math.inf", "-np.inf", "-float('inf')", "-numpy.inf", "float('-Inf')"})


def _ctc(node: ast.expr | ast.AugAssign, culprit: Culprit, source: list[str]) -> Iterator[Edit]:
    if isinstance(node, ast.Call) and _called(node) == "ctc_loss" and "zero_infinity" not in {word.arg for word in node.keywords}:
        text = _text(source, node)
        if "\n" not in text:
            yield Edit(_span(node), _with_keyword(text, node, "zero_infinity=True"))


def _trap(tree: ast.AST, culprit: Culprit, source: list[str]) -> list[Edit]:
    """Where the operator stands in a branch of `torch.where`, its input is to be chosen before it, too: the double `where`."""
    traps: list[Edit] = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and _called(node) == "where" and len(node.args) == 3 and not _is_method(node)):
            continue
        if any(
            "rand" in _called(inner) or _called(inner) in _DRAW for inner in ast.walk(node.args[0]) if isinstance(inner, ast.Call)
        ):
            continue  # asked twice it may say something else
        condition = _text(source, node.args[0])
        for number, branch in enumerate(node.args[1:]):
            for inner in _elementwise(branch):
                if culprit.span is not None and not _is_running(inner, culprit.span):
                    continue
                argument = _argument_of(inner, culprit)
                if argument is None:
                    continue
                text = _text(source, argument)
                chosen = (text, "1.0") if number == 0 else ("1.0", text)
                traps.append(Edit(_span(argument), f"torch.where({condition}, {', '.join(chosen)})"))
    return traps


_DRAW = frozenset(("bernoulli", "bernoulli_", "multinomial", "sample", "dropout", "next", "pop", "popleft", "choice"))


def _elementwise(node: ast.expr) -> Iterator[ast.expr]:
    """An expression, and what is below it by operators that keep the shape, so that the condition fits there, too."""
    yield node
    below: list[ast.expr] = []
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.MatMult):
        below = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp):
        below = [node.operand]
    elif isinstance(node, ast.Call) and _called(node).strip("_") in _KEEP_SHAPE:
        subject = _subject(node)
        below = [*([subject] if subject is not None and subject not in node.args else []), *node.args]
    for inner in below:
        yield from _elementwise(inner)


_KEEP_SHAPE = (
    frozenset(
        ("abs", "neg", "exp", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "pow", "reciprocal", "xlogy")
    )
    | frozenset(
        ("add", "sub", "mul", "div", "divide", "true_divide", "sin", "cos", "acos", "asin", "atan", "atanh", "sinh", "cosh")
    )
    | frozenset(("tanh", "sigmoid", "logsigmoid", "softplus", "relu", "clamp", "clamp_min", "clamp_max", "float", "double"))
)


def _argument_of(node: ast.AST, culprit: Culprit) -> ast.expr | None:
    """The argument of an operator that leaves its domain, where a node is a call of it."""
    op = culprit.op.strip("_")
    if op == "div":
        divisor = _divisor(node)
        if divisor is None:
            return None
        if _is_a_root(divisor):  # of a root of 0 the derivative is infinite, too
            return divisor.left if isinstance(divisor, ast.BinOp) else _subject(divisor) if isinstance(divisor, ast.Call) else None
        named = (ast.unparse(inner) for inner in ast.walk(divisor) if isinstance(inner, (ast.Name, ast.Attribute)))
        rooted = any(_is_a_root(inner) for inner in ast.walk(divisor)) or any(name in culprit.roots for name in named)
        return None if rooted else divisor
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and op == "pow":
        return node.left
    if isinstance(node, ast.Call) and _called(node) == op:
        return _subject(node)
    return None


_UNIT = "clamp(-1 + 1e-6, 1 - 1e-6)"
_MENDS: dict[str, _Make] = {
    **{op: _argument((op, f"{op}_"), _clamped(f"clamp_min({EPS})")) for op in ("log", "log2", "log10")},
    "log1p": _argument(("log1p",), _clamped("clamp_min(-1 + 1e-6)")),
    **{op: _argument((op, f"{op}_", f"arc{op[1:]}"), _clamped(_UNIT)) for op in ("acos", "asin", "atanh")},
    **{op: _argument((op, f"{op}_"), _clamped("clamp(max=20)")) for op in ("exp", "expm1", "exp2")},
    **{op: _argument((op, f"{op}_"), _clamped("clamp(-20, 20)")) for op in ("sinh", "cosh")},
    **dict.fromkeys(("sqrt", "rsqrt", "pow"), _root),
    **dict.fromkeys(("div", "reciprocal", "true_divide"), _division),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _variance),
    "to_copy": _to_half,
    **dict.fromkeys(("softmax", "safe_softmax"), _mask),
    "ctc_loss": _ctc,
}
