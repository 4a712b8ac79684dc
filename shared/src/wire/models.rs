//! `/v1/models`.

use serde::{Deserialize, Serialize};

/// The served models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelList {
    /// What this object is.
    pub object: ListObject,
    /// One entry a served name.
    pub data: Vec<Model>,
}

/// One served name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// What requests call it.
    pub id: String,
    /// What this object is.
    pub object: ModelObject,
    /// Unix seconds at which it was loaded.
    pub created: u64,
    /// Who serves it.
    pub owned_by: String,
}

/// `"list"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ListObject {
    /// The only value.
    #[default]
    List,
}

/// `"model"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelObject {
    /// The only value.
    #[default]
    Model,
}

impl ModelList {
    /// A list of `names`, all loaded at `created`.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>, created: u64) -> Self {
        let model = |name: &str| Model {
            id: name.to_owned(),
            object: ModelObject::Model,
            created,
            owned_by: "baton".to_owned(),
        };
        Self { object: ListObject::List, data: names.into_iter().map(model).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_list_is_openais() {
        let text = serde_json::to_string(&ModelList::new(["M"], 7)).unwrap();
        assert_eq!(
            text,
            r#"{"object":"list","data":[{"id":"M","object":"model","created":7,"owned_by":"baton"}]}"#
        );
    }
}
