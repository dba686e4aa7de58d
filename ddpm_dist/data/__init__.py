"""Images in; resumable batches of images, timesteps and noise out."""
