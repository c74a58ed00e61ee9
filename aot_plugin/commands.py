"""``axolotl aot-check``, ``aot-configs`` and ``aot-report``: our commands among the host's own.

The host finds them by the entry points `axolotl.cli_commands`. It imports this module for
`axolotl --help`, too, so the commands themselves are imported when one of them is called.
"""

import click


def _command(name: str, summary: str) -> click.Command:
    """A command of the host that leaves its arguments, `--help` among them, to our own parser."""

    @click.command(
        name,
        short_help=summary,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        from .__main__ import main

        raise SystemExit(main([name, *arguments], prog="axolotl", prefix="aot-"))

    return command


check = _command("aot-check", "Show what a config will train, before a training.")
configs = _command("aot-configs", "Write AOT's example configs to a directory.")
report = _command("aot-report", "Compare runs by first-order stochastic dominance.")
