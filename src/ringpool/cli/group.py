"""``ringpool`` as click has it: the group of its commands."""

from __future__ import annotations

import click

from ringpool import __version__
from ringpool.cli.bench import bench
from ringpool.cli.look import clean, results, status
from ringpool.cli.run import resume, retry, run


def verb_of(error: click.ClickException, arguments: list[str]) -> str:
    """The command that ``error`` is about, with a space behind it; empty where it is about none."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None and context.parent is not None:
        return f"{context.info_name} "
    return next((f"{word} " for word in arguments[:1] if word in ringpool.commands), "")


def _print_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"ringpool {__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="The version."
)
def ringpool() -> None:
    """Run a function over very many files, on all cores. Kill any worker: no file is lost."""


for _command in (run, resume, retry, status, results, clean, bench):
    ringpool.add_command(_command)
