"""A row filter: `dt >= '2026-11-01' and (0 < amount <= 50 or kind in ('a', 'b'))`.

Comparisons are joined by `and`, `or`, `not` and parentheses, which bind as in SQL and in Python:
`not` before `and` before `or`. The logic is SQL's, of three values: what is compared with null is
neither true nor false but unknown. So is `not` of it, so are `in` and `not in`; `in` a list that
has a null in it is never false, and `not in` such a list never true. A row passes where the whole
is true. NaN is a missing value here, as null is: both are `null`, and each row passes one of
`x == 1`, `x != 1` and `x is null`.
"""

from __future__ import annotations

import ast
import io
import math
import re
import tokenize
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

from gmm_dist.errors import UserError
from gmm_dist.lake.filters.where import KEYWORDS, Clause, Either, Where, one_of, shortened, spell
from gmm_dist.lake.parquet.comparing import Literal

_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_FLIPPED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_NEGATED = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_AFTER_A_COLUMN = frozenset({"==", "!=", "<", "<=", ">", ">=", ")", "and", "or"})
_WORDS = {"true": True, "false": False}
_MOST_BITS = 4096
_DEEPEST = 50
_REMEDY = (
    "write comparisons joined by 'and', 'or', 'not', such as \"dt >= '2026-11-01' and (0 < amount "
    "<= 50 or kind in ('a', 'b')) and id is not null\"; a column whose name has dots, spaces and "
    "such is col('dep delay')"
)


def parse(text: str) -> Where:
    """Read a filter, in Python's syntax or SQL's.

    Comparisons are `==, !=, <, <=, >, >=`, chains of them (`0 < x <= 5`) with the literal on
    either side, `x in (1, 2)`, `x not in (1, 2)`, `x is null`, `x is not null`; `and`, `or`,
    `not` and parentheses join them. Literals are strings (also for dates and times, UTC without
    an offset), numbers, True and False. A column whose name is not a Python name is written
    `col('dep delay')`. Keywords may be in any case. Nothing is evaluated.

    Raises:
        UserError: anything else.
    """
    source = _lowered(text.strip())
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = f"filter {_quoted(text)} cannot be read{_place(source, error)}"
        raise UserError(f"{what}; {_syntax_remedy(source)}") from error
    _refuse_rounded(tree, text)
    try:
        where = _Reader(text, source).condition(tree, negated=False)
        is_deep = _depth(where) > _DEEPEST
    except RecursionError:
        is_deep = True
    if is_deep:
        raise UserError(
            f"filter {_quoted(text)}: 'and' and 'or' within each other more than {_DEEPEST} deep; "
            "write it with fewer parentheses"
        )
    return where


@dataclass(frozen=True, slots=True)
class _Column:
    """Name a column; a bare name may also be a word such as null."""

    name: str
    is_bare: bool

    @property
    def word(self) -> str:
        return self.name.lower() if self.is_bare else ""


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turn Python's tree of a filter into a `Where`; `text` is the filter as it was written."""

    text: str
    source: str

    def condition(self, node: ast.expr, *, negated: bool) -> Where:
        """Return a part of the filter, or its negation: what is true where that is false."""
        match node:
            case ast.UnaryOp(op=ast.Not()):
                return self.condition(node.operand, negated=not negated)
            case ast.BoolOp():
                parts = [self.condition(value, negated=negated) for value in node.values]
                if isinstance(node.op, ast.Or) != negated:
                    return Where.any_of(parts)
                return Where.all_of(clause for part in parts for clause in part.clauses)
            case ast.Compare(ops=[ast.In() | ast.NotIn() as op]):
                return self._in(node, negated=isinstance(op, ast.NotIn) != negated)
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as op]):
                return self._is_null(node, negated=isinstance(op, ast.IsNot) != negated)
            case ast.Compare():
                clauses = self._comparisons(node)
                if negated:
                    opposite = ((name, _NEGATED[op], literal) for name, op, literal in clauses)
                    return Where.any_of(Where((clause,)) for clause in opposite)
                return Where.all_of(clauses)
        raise self._not_supported(node)

    def _in(self, node: ast.Compare, *, negated: bool) -> Where:
        name = self._operand(node.left, node)
        (values,) = node.comparators
        if not isinstance(name, _Column):
            raise self._not_supported(node)
        nodes = values.elts if isinstance(values, ast.Tuple | ast.List) else [values]
        if not self._has_parentheses(values) or not nodes:
            raise self._wrong(node, "has no list", f"write {spell(name.name)} in ('a', 'b')")
        operands = [self._operand(value, node) for value in nodes]
        literals: dict[str, Literal] = {}
        has_null = False
        for operand in operands:
            if _is_null(operand):
                has_null = True
                continue
            literal = _word(operand)
            if isinstance(literal, _Column):
                raise self._not_supported(node)
            literals[repr(literal)] = literal
        if not negated:
            return Where((one_of(name.name, literals.values()),))
        if has_null:  # false or unknown, and never true
            return Where((one_of(name.name, ()),))
        return Where.all_of((name.name, "!=", literal) for literal in literals.values())

    def _has_parentheses(self, values: ast.expr) -> bool:
        """Say whether values are in parentheses: Python's tree shows those of several alone."""
        if isinstance(values, ast.Tuple | ast.List):
            return True
        line = self.source.encode().splitlines()[: values.lineno]
        line[-1] = line[-1][: values.col_offset]
        return b"".join(line).rstrip().endswith(b"(")

    def _is_null(self, node: ast.Compare, *, negated: bool) -> Where:
        name, null = (self._operand(part, node) for part in (node.left, *node.comparators))
        if not isinstance(name, _Column) or not _is_null(null):
            raise self._wrong(
                node, "asks for something else than null", "write 'is null', 'is not null' or '=='"
            )
        return Where(((name.name, "is not" if negated else "is", None),))

    def _comparisons(self, node: ast.Compare) -> list[Clause]:
        if not all(type(op) in _OPERATORS for op in node.ops):
            raise self._wrong(node, "is a chain", "write comparisons one by one, joined by 'and'")
        operands = [self._operand(part, node) for part in (node.left, *node.comparators)]
        clauses: list[Clause] = []
        for op, (left, right) in zip(node.ops, pairwise(operands), strict=True):
            symbol = _OPERATORS[type(op)]
            if isinstance(left, _Column) and isinstance(right, _Column):
                if _is_null(right) or _is_null(left):
                    raise self._null_compared(node, left if _is_null(right) else right)
                left, right = (left, _word(right)) if right.word in _WORDS else (_word(left), right)
            elif left is None or right is None:
                column = right if left is None else left
                raise self._null_compared(node, column)
            if isinstance(left, _Column) == isinstance(right, _Column):
                raise self._not_supported(node)
            if isinstance(left, _Column):
                assert not isinstance(right, _Column)
                clauses.append((left.name, symbol, right))
            elif isinstance(right, _Column):
                clauses.append((right.name, _FLIPPED[symbol], left))
        return clauses

    def _operand(self, node: ast.expr, within: ast.Compare) -> _Column | Literal | None:
        """Return a column, or a literal as its value: None for null."""
        match node:
            case ast.Name():
                return _Column(node.id, is_bare=True)
            case ast.Call(
                func=ast.Name(id="col"), args=[ast.Constant(value=str(name))], keywords=[]
            ):
                return _Column(name, is_bare=False)
            case ast.Constant(value=None):
                return None
            case ast.Constant(value=bool() | str() as value):
                return value
            case ast.Constant(value=int() | float() as value) if _is_number(value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                if _is_number(value):
                    return -value
        raise self._not_supported(node)

    def _null_compared(self, node: ast.expr, column: object) -> UserError:
        name = spell(column.name) if isinstance(column, _Column) else "x"
        return self._wrong(node, "is never true", f"write '{name} is null' or '{name} is not null'")

    def _not_supported(self, node: ast.expr) -> UserError:
        what = "is not a comparison of a column with a string, a number, True or False"
        return self._wrong(node, what, _REMEDY)

    def _wrong(self, node: ast.expr, what: str, remedy: str) -> UserError:
        return UserError(
            f"filter {_quoted(self.text)}: {_quoted(_unparsed(node))} {what}; {remedy}"
        )


def _is_null(operand: _Column | Literal | None) -> bool:
    return operand is None or (isinstance(operand, _Column) and operand.word == "null")


def _word(operand: _Column | Literal | None) -> _Column | Literal:
    """Return True and False for names of such a spelling, whatever their case."""
    assert operand is not None
    return _WORDS.get(operand.word, operand) if isinstance(operand, _Column) else operand


def _depth(where: Where) -> int:
    eithers = [clause for clause in where.clauses if isinstance(clause, Either)]
    return 1 + max((_depth(one) for either in eithers for one in either.alternatives), default=0)


def _lowered(text: str) -> str:
    """Return a filter's text with its keywords in lower case: no character moves.

    Where a value is due, `AND` and such are the names of columns.
    """
    tokens: list[tokenize.TokenInfo] = []
    with suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
                tokens.append(token)
    lines = list(io.StringIO(text))  # as the tokens are numbered: U+2028 and such end no line
    is_value_due = True
    for i, token in enumerate(tokens):
        word = token.string.lower()
        is_keyword = token.type == tokenize.NAME and word in KEYWORDS
        if is_keyword and token.string != word and is_value_due:
            following = tokens[i + 1].string.lower() if i + 1 < len(tokens) else ")"
            is_keyword = word == "not" and following not in _AFTER_A_COLUMN
        if is_keyword and token.string != word:
            (row, start), (_, stop) = token.start, token.end
            line = lines[row - 1]
            lines[row - 1] = line[:start] + word + line[stop:]
        is_operator = token.type == tokenize.OP and token.string not in (")", "]")
        is_infix_not = is_keyword and word == "not" and not is_value_due  # `in` is due
        is_value_due = (is_keyword or is_operator) and not is_infix_not
    return "".join(lines)


def _place(source: str, error: BaseException) -> str:
    """Say where in a filter Python stopped reading."""
    if not isinstance(error, SyntaxError):
        return ""
    lines = source.split("\n")[(error.lineno or 1) - 1 :]
    at = error.offset - 1 if error.offset else len(source)
    rest = " ".join("\n".join(lines)[at:].split())
    return f" from {shortened(repr(rest), 40)} on" if rest else " to its end"


def _syntax_remedy(source: str) -> str:
    for wrong, right, what in (
        (r"(?<![=<>!])=(?!=)", "==", "equality is written '==', not '='"),
        ("<>", "!=", "inequality is written '!=', not '<>'"),
    ):
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            if (mended := re.sub(wrong, right, source)) != source:
                ast.parse(mended, mode="eval")
                return what
    return _REMEDY


def _refuse_rounded(tree: ast.expr, text: str) -> None:
    """Raise for a number that Python rounds: decimals would be compared with another one."""
    lines = text.strip().encode().splitlines()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, float)):
            continue
        spelt = lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()
        if math.isfinite(node.value) and Decimal(spelt) != Decimal(repr(node.value)):
            raise UserError(
                f"filter {_quoted(text)}: {shortened(spelt)} has more digits than a number here "
                f"can have, and would be {node.value!r}; write it in quotes, or with fewer digits"
            )


def _is_number(value: float) -> bool:
    """Say whether a number can be compared with: Python spells no whole number of 4,300 digits."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, bool) and value.bit_length() <= _MOST_BITS


def _unparsed(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except (RecursionError, ValueError):
        return "..."


def _quoted(text: str) -> str:
    return shortened(repr(text))
