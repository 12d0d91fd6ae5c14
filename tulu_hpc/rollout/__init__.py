"""Generation of completions for training and evaluation: token ids in, token ids and behaviour log-probs out."""
