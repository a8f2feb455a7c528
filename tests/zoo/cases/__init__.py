"""The runs that the score of the README is made of: sick ones, each with its source and a proof in plain torch, and healthy ones."""
