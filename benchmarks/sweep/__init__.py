"""The same checks over every model that torchvision, timm and transformers can build."""
