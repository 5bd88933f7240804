"""Features of a data set that give the consistency loss its direction: `python -m ect.tangent` trains and keeps them."""
