"""One small adapter per pipeline class; `alignkit.generators.GENERATORS` names them."""
