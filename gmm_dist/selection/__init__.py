"""Where fits start, which candidates share their passes, and which K is taken."""
