"""Verbs as typer has them, but for their help: typer names a type, <bool>, even of options that take no value; and for
Ctrl-C, at which typer ends without a word."""

import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class _FlagsWithoutType:
    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of the class beside this one
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Verb(_FlagsWithoutType, TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            tell_interrupted(interrupt)
            raise


class _Group(_FlagsWithoutType, TyperGroup):
    pass


def tell_interrupted(interrupt: KeyboardInterrupt) -> None:
    """The last line of a command that Ctrl-C ends. A verb that leaves something to go on with says so in the
    exception."""
    print(": ".join(("interrupted", *map(str, interrupt.args))), file=sys.stderr, flush=True)


class Verbs(typer.Typer):
    """Several verbs, or those of a verb."""

    def __init__(self, **options: Any):
        super().__init__(cls=_Group, no_args_is_help=True, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=_Verb, **options)
