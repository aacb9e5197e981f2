"""`alignkit doctor`: one module per question (`main` is the verb)."""
