"""``python -m crowdexit`` is the ``crowdexit`` command."""

from crowdexit.cli import main

if __name__ == "__main__":
    main()
