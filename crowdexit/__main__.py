"""The ``crowdexit`` command, also as ``python -m crowdexit``."""

from __future__ import annotations

from crowdexit.utils.signals import end_in_one_line


def main() -> None:
    """Run the command line; signals during the imports end in one line, too."""
    end_in_one_line()
    from crowdexit.cli import main as cli

    cli.main()


if __name__ == "__main__":
    main()
