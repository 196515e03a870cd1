namespace twinjet::sampler {}
