"""`alignkit studio`: the config (`job`), mixtures, scores and exports (`session`), the page (`page`), the verb (`main`)."""
