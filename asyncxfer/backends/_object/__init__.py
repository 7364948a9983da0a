"""What the backends of object stores share: everything but what one store's requests and answers look like."""
