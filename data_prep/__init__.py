"""Scripts that turn public data sets into prepared files: ``python -m data_prep.shanghaitech --help``."""

from crowdexit.utils.signals import end_imports_in_one_line

end_imports_in_one_line()
