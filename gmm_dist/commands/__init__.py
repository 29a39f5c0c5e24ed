"""The command line: arguments, what is printed, how jobs end. `gmm-dist` and jobs/*.py call it."""
