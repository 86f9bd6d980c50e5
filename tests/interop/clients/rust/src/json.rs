//! Between the generated messages and their proto3 JSON, by way of the descriptors.
use std::sync::LazyLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use serde_json::{Map, Value};

use crate::Failure;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let descriptors = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
    DescriptorPool::decode(descriptors.as_slice()).expect("the build wrote them")
});

/// Makes the message that `json` stands for.
pub fn read<T: Message + Name + Default>(json: &Value) -> Result<T, Failure> {
    let message = DynamicMessage::deserialize(descriptor::<T>(), expanded(json))?;
    Ok(message.transcode_to()?)
}

/// Writes a message as JSON.
pub fn write<T: Message + Name>(message: &T) -> Result<Value, Failure> {
    // By way of a string: only there does a 32-bit float keep its short form.
    let text = serde_json::to_string(&dynamic(message)?)?;
    Ok(serde_json::from_str(&text)?)
}

/// Whether a message has the values that `fields` gives to some of its fields.
pub fn has_fields<T: Message + Name>(
    message: &T,
    fields: &Map<String, Value>,
) -> Result<bool, Failure> {
    let actual = dynamic(message)?;
    let expected = DynamicMessage::deserialize(descriptor::<T>(), Value::Object(fields.clone()))?;
    for name in fields.keys() {
        let field = by_either_name::<T>(name).ok_or_else(|| format!("no field {name}"))?;
        if actual.get_field(&field) != expected.get_field(&field) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn by_either_name<T: Name>(name: &str) -> Option<prost_reflect::FieldDescriptor> {
    let message = descriptor::<T>();
    message
        .get_field_by_name(name)
        .or_else(|| message.get_field_by_json_name(name))
}

fn dynamic<T: Message + Name>(message: &T) -> Result<DynamicMessage, Failure> {
    let mut dynamic = DynamicMessage::new(descriptor::<T>());
    dynamic.transcode_from(message)?;
    Ok(dynamic)
}

fn descriptor<T: Name>() -> MessageDescriptor {
    POOL.get_message_by_name(&T::full_name())
        .expect("the stubs come from the same descriptors")
}

/// Writes out `{"$repeat": "ab", "count": 3}` wherever it stands.
fn expanded(json: &Value) -> Value {
    match json {
        Value::Array(items) => items.iter().map(expanded).collect(),
        Value::Object(fields) => repeated(fields).unwrap_or_else(|| {
            let fields = fields.iter();
            fields.map(|(k, v)| (k.clone(), expanded(v))).collect()
        }),
        other => other.clone(),
    }
}

fn repeated(fields: &Map<String, Value>) -> Option<Value> {
    let text = fields.get("$repeat")?.as_str()?;
    let count = fields.get("count")?.as_u64()?;
    Some(text.repeat(usize::try_from(count).ok()?).into())
}
