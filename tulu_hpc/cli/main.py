"""`tulu-hpc VERB CONFIG.yaml [dotted.key=value ...]`.

Exit codes: 0 done; 2 bad input (one line `error: ...`; TULU_HPC_TRACEBACK=1 shows where); 85 saved and stopped on
request, to be started again; anything else is a fault of the program and comes with a traceback.
"""

from __future__ import annotations

import sys

import typer

from tulu_hpc import __version__
from tulu_hpc.cli import audit, cluster, convert, data, rollout, tools, training
from tulu_hpc.cli.common import EXIT_BAD_INPUT, rank_prefix, report_error, wants_traceback

# typer carries its own copy of click from 0.20 on and used the installed one before; this is the right class in both.
ClickException = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_UNUSABLE_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)

app = typer.Typer(
    name="tulu-hpc",
    help="Tulu 3 post-training on megatron-core: SFT, reward models, DPO, RLVR, their data and evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make, mix, clean and prefer data.", no_args_is_help=True, rich_markup_mode=None)
rollout_app = typer.Typer(help="Servers that generate rollouts.", no_args_is_help=True, rich_markup_mode=None)
convert_app = typer.Typer(help="Model directories.", no_args_is_help=True, rich_markup_mode=None)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"tulu-hpc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command()(training.sft)
app.command()(training.dpo)
app.command("rm")(training.reward_model)
app.command()(training.rlvr)
app.command()(training.recipe)
app.command("eval")(training.evaluate)
app.add_typer(data_app, name="data")
data_app.command()(data.synthesize)
data_app.command()(data.mix)
data_app.command()(data.decontaminate)
data_app.command()(data.prefer)
data_app.command()(data.preview)
data_app.command()(data.samples)
app.add_typer(convert_app, name="convert")
convert_app.command()(convert.initialise)
convert_app.command("import")(convert.import_)
convert_app.command()(convert.export)
convert_app.command()(convert.verify)
app.add_typer(rollout_app, name="rollout")
rollout_app.command()(rollout.serve)
app.command()(cluster.plan)
app.command()(cluster.launch)
app.command()(audit.audit)
app.command()(tools.doctor)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(tools.bench)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; bad input (ValueError, missing or unreadable files) is one line, exit code 2."""
    try:
        # Not standalone: typer would print its own boxes and turn every exit code into its own.
        code = app(args=arguments, standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except (ValueError, *_UNUSABLE_FILES) as error:
        if wants_traceback():
            raise
        report_error(error)
        sys.exit(EXIT_BAD_INPUT)
    except Exception as error:
        if not isinstance(error, ClickException):
            raise
        context = getattr(error, "ctx", None)
        hint = f" (try `{context.command_path} --help`)" if context is not None else ""
        print(f"{rank_prefix()}error: {error.format_message()}{hint}", file=sys.stderr)  # type: ignore[attr-defined]
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(code if isinstance(code, int) else 0)
