"""A run as one page of HTML, and several runs side by side on one: made from the runs' folders alone."""
