namespace twinjet::kv {}
