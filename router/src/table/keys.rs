//! The keys shared with the workers, as a handle that follows reloads.

use std::sync::Arc;

use arc_swap::ArcSwap;
use baton_shared::wire::auth::Keys;

/// The keys in use now. Cheap to clone; all clones see the same.
#[derive(Clone, Debug)]
pub struct LiveKeys(Arc<ArcSwap<Keys>>);

impl From<Keys> for LiveKeys {
    fn from(keys: Keys) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(keys)))
    }
}

impl LiveKeys {
    /// Whether there is a key.
    pub fn authenticate(&self) -> bool {
        self.0.load().authenticate()
    }

    /// As [`Keys::sign_release`].
    pub fn sign_release(&self, body: &[u8]) -> String {
        self.0.load().sign_release(body)
    }

    /// As [`Keys::sign_disagg`].
    pub fn sign_disagg(&self, endpoint: Option<&str>, state: Option<&str>) -> Option<String> {
        self.0.load().sign_disagg(endpoint, state)
    }

    pub(super) fn get(&self) -> Arc<Keys> {
        self.0.load_full()
    }

    pub(super) fn set(&self, keys: Arc<Keys>) {
        self.0.store(keys);
    }
}
