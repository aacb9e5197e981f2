"""`alignkit studio`: its config (`job`), mixtures (`session`), page (`view`, `page`, `guard`) and verb (`main`)."""
