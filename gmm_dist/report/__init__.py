"""report.html: one file that shows a fit, a sweep or a night, and opens anywhere."""
