"""Arithmetic in data files: ``hidden_size // num_attention_heads`` and the like.

Architectures are data, and their data names fields of a model's config and
says how to compute with them. An expression may use numbers, strings, names,
arithmetic, comparisons, ``and or not``, ``x if c else y``, ``in``, one level of
indexing after another, and the functions of ``_FUNCTIONS``. Nothing else is
evaluated, so a data file cannot run code.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["ExpressionError", "MissingNameError", "evaluate", "first"]

_MAX_LENGTH = 1000


class ExpressionError(ValueError):
    """The expression is no expression, or does not go with the values."""


class MissingNameError(ExpressionError):
    """The expression uses a name, key or index that the config does not have."""


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ceil": math.ceil,
    "int": int,
    "len": len,
    "max": max,
    "min": min,
}


def evaluate(expression: object, names: Mapping[str, Any]) -> Any:
    """Compute ``expression`` over ``names``; a null counts as missing.

    Anything but a string is its own value.

    Raises:
      MissingNameError: It names something that is not there, or null.
      ExpressionError: It cannot be read or computed.
    """
    if not isinstance(expression, str):
        return expression
    try:
        return _value(_parse(expression), names)
    except ExpressionError:
        raise
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise ExpressionError(f"{expression!r}: {error}") from error


def first(alternatives: object, names: Mapping[str, Any]) -> Any:
    """Compute the first of ``alternatives`` that has all its names.

    Raises:
      MissingNameError: None has; the message names what the first one lacks.
      ExpressionError: One of them cannot be computed.
    """
    choices = alternatives if isinstance(alternatives, list) else [alternatives]
    missing: MissingNameError | None = None
    for choice in choices:
        try:
            return evaluate(choice, names)
        except MissingNameError as error:
            missing = missing or error
    raise missing or MissingNameError("nothing to compute")


@functools.lru_cache(maxsize=512)
def _parse(expression: str) -> ast.expr:
    if len(expression) > _MAX_LENGTH:
        raise ExpressionError(f"an expression of {len(expression)} characters")
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"{expression!r}: not an expression") from error


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    compute = _NODES.get(type(node))
    if compute is None:
        raise ExpressionError(f"{ast.unparse(node)!r}: not allowed here")
    return compute(node, names)


def _constant(node: ast.Constant, names: Mapping[str, Any]) -> Any:
    return node.value


def _name(node: ast.Name, names: Mapping[str, Any]) -> Any:
    value = names.get(node.id)
    if value is None:
        raise MissingNameError(node.id)
    return value


def _attribute(node: ast.Attribute, names: Mapping[str, Any]) -> Any:
    value = _value(node.value, names)
    inner = value.get(node.attr) if isinstance(value, Mapping) else None
    if inner is None:
        raise MissingNameError(ast.unparse(node))
    return inner


def _subscript(node: ast.Subscript, names: Mapping[str, Any]) -> Any:
    items = _value(node.value, names)
    index = _value(node.slice, names)
    try:
        return items[index]
    except (LookupError, TypeError):
        raise MissingNameError(ast.unparse(node)) from None


def _list(node: ast.List, names: Mapping[str, Any]) -> list[Any]:
    return [_value(item, names) for item in node.elts]


def _binary(node: ast.BinOp, names: Mapping[str, Any]) -> Any:
    compute = _OPERATORS.get(type(node.op))
    left, right = _value(node.left, names), _value(node.right, names)
    if compute is None or not all(isinstance(x, (int, float)) for x in (left, right)):
        raise ExpressionError(
            f"{ast.unparse(node)!r}: needs two numbers and + - * / // %"
        )
    return compute(left, right)


def _unary(node: ast.UnaryOp, names: Mapping[str, Any]) -> Any:
    value = _value(node.operand, names)
    if isinstance(node.op, ast.Not):
        return not value
    if isinstance(node.op, ast.USub) and isinstance(value, (int, float)):
        return -value
    raise ExpressionError(f"{ast.unparse(node)!r}: not allowed here")


def _boolean(node: ast.BoolOp, names: Mapping[str, Any]) -> Any:
    stop_at = isinstance(node.op, ast.Or)
    value: Any = not stop_at
    for part in node.values:
        value = _value(part, names)
        if bool(value) is stop_at:
            break
    return value


def _comparison(node: ast.Compare, names: Mapping[str, Any]) -> bool:
    left = _value(node.left, names)
    for op, right_node in zip(node.ops, node.comparators, strict=True):
        compare = _COMPARISONS.get(type(op))
        if compare is None:
            raise ExpressionError(f"{ast.unparse(node)!r}: not allowed here")
        right = _value(right_node, names)
        if not compare(left, right):
            return False
        left = right
    return True


def _choice(node: ast.IfExp, names: Mapping[str, Any]) -> Any:
    chosen = node.body if _value(node.test, names) else node.orelse
    return _value(chosen, names)


def _call(node: ast.Call, names: Mapping[str, Any]) -> Any:
    if not isinstance(node.func, ast.Name) or node.keywords:
        raise ExpressionError(f"{ast.unparse(node)!r}: not allowed here")
    if node.func.id == "given":  # given(name): is it there and not null?
        return all(_is_given(argument, names) for argument in node.args)
    function = _FUNCTIONS.get(node.func.id)
    if function is None:
        known = ", ".join(["given", *_FUNCTIONS])
        raise ExpressionError(f"{node.func.id!r} is no function here ({known})")
    return function(*(_value(argument, names) for argument in node.args))


def _is_given(node: ast.expr, names: Mapping[str, Any]) -> bool:
    try:
        _value(node, names)
    except MissingNameError:
        return False
    return True


_NODES: dict[type, Callable[..., Any]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.Subscript: _subscript,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.Compare: _comparison,
    ast.IfExp: _choice,
    ast.Call: _call,
    ast.List: _list,
}
