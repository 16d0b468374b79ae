"""How rows that are no leading axis leave a tensor and come home: tiles of images, tokens with their neighbours."""
