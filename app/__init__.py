"""The page: ``crowdexit app``, or ``python -m app`` in a checkout."""

from crowdexit.utils.signals import end_imports_in_one_line

end_imports_in_one_line()
