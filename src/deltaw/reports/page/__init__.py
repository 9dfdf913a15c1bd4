"""HTML pages: the report of one run, and the comparison of several runs."""
