"""Making and cleaning training data: decontamination, preference pairs, synthetic sets."""
