"""Scripts that turn public data sets into prepared files: ``crowdexit prepare``."""

from crowdexit.utils.signals import end_imports_in_one_line

end_imports_in_one_line()
