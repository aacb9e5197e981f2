"""`alignkit studio`: config (`job`), mixtures and exports (`session`), page (`view`, `page`, `guard`), verb (`main`)."""
