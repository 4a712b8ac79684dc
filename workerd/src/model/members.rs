//! A JSON object of settings: members by name, each taken as what it must be or refused by name.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::error::ModelError;
use super::tensors::TensorFile;

/// Longest configuration file, bytes.
const LIMIT: u64 = 4 << 20;

/// The members of one file, or of an object in it.
pub struct Members {
    path: PathBuf,
    members: Map<String, Value>,
    /// `rope_scaling.` within `rope_scaling`.
    prefix: String,
}

impl Members {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ModelError`], also when it is no JSON object.
    pub fn read(path: PathBuf) -> Result<Self, ModelError> {
        let file = TensorFile::open(&path)?;
        if file.size() > LIMIT {
            let rule = format!("is {} bytes long, the limit is {LIMIT}", file.size());
            return Err(ModelError::file(&path, rule));
        }
        let bytes = file.read(0, file.size())?.unwrap_or_default();
        match serde_json::from_slice(&bytes) {
            Ok(members) => Ok(Self { path, members, prefix: String::new() }),
            Err(e) => Err(ModelError::file(&path, e.to_string())),
        }
    }

    /// The error of a member.
    pub fn refuse(&self, key: &str, rule: impl Into<String>) -> ModelError {
        ModelError::setting(&self.path, &format!("{}{key}", self.prefix), rule)
    }

    /// Of all members.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// Whether the member is there, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.members.contains_key(key)
    }

    /// The member, null counting as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.members.get(key).filter(|v| !v.is_null())
    }

    /// An object.
    ///
    /// # Errors
    /// When it is something else.
    pub fn object(&self, key: &str) -> Result<Option<Self>, ModelError> {
        let Some(found) = self.get(key) else { return Ok(None) };
        let Some(members) = found.as_object() else {
            return Err(self.refuse(key, format!("is {found}, not an object")));
        };
        let (path, prefix) = (self.path.clone(), format!("{}{key}.", self.prefix));
        Ok(Some(Self { path, members: members.clone(), prefix }))
    }

    /// A whole number.
    ///
    /// # Errors
    /// When it is something else.
    pub fn number(&self, key: &str) -> Result<Option<u32>, ModelError> {
        let Some(found) = self.get(key) else { return Ok(None) };
        match found.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(self.refuse(key, format!("is {found}, not a whole number below 2^32"))),
        }
    }

    /// A whole number that must be there.
    ///
    /// # Errors
    /// When it is missing or something else.
    pub fn need(&self, key: &str) -> Result<u32, ModelError> {
        self.number(key)?.ok_or_else(|| self.refuse(key, "is missing"))
    }

    /// A number.
    ///
    /// # Errors
    /// When it is something else.
    pub fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(found) = self.get(key) else { return Ok(None) };
        match found.as_f64() {
            Some(x) => Ok(Some(x)),
            None => Err(self.refuse(key, format!("is {found}, not a number"))),
        }
    }

    /// A number above 0 that must be there.
    ///
    /// # Errors
    /// When it is missing or something else.
    pub fn need_positive(&self, key: &str) -> Result<f64, ModelError> {
        match self.float(key)? {
            None => Err(self.refuse(key, "is missing")),
            Some(x) if x > 0.0 && x.is_finite() => Ok(x),
            Some(x) => Err(self.refuse(key, format!("is {x}, not above 0"))),
        }
    }

    /// True or false; false when it is missing.
    ///
    /// # Errors
    /// When it is something else.
    pub fn flag(&self, key: &str) -> Result<bool, ModelError> {
        let Some(found) = self.get(key) else { return Ok(false) };
        match found.as_bool() {
            Some(b) => Ok(b),
            None => Err(self.refuse(key, format!("is {found}, not true or false"))),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// When it is something else.
    pub fn string(&self, key: &str) -> Result<Option<&str>, ModelError> {
        let Some(found) = self.get(key) else { return Ok(None) };
        match found.as_str() {
            Some(s) => Ok(Some(s)),
            None => Err(self.refuse(key, format!("is {found}, not a string"))),
        }
    }

    /// One id, a list of ids, or none.
    ///
    /// # Errors
    /// When it is something else.
    pub fn ids(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let list = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        let id = |v: &Value| {
            let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
            id.ok_or_else(|| self.refuse(key, format!("has {v}, not a token id")))
        };
        list.iter().map(id).collect()
    }
}
