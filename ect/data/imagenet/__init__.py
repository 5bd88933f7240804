"""ImageNet in EDM's zip: `python -m ect.data.imagenet`. Any folder with a folder of pictures for each class will do."""
