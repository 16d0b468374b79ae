"""Native kernels, compiled at install where there is a C compiler; elsewhere torch runs."""
