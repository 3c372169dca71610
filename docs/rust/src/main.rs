//! Reads lines `<type> <form> <hex>` and writes, for each, its bytes again: `<hex> <what it is>`.

use hostd_wire::{Command, Event, HostdRequest, HostdResponse, Reply};
use serde::{de::DeserializeOwned, Serialize};
use std::fmt::Debug;
use std::io::{stdin, BufRead};

fn again<T: DeserializeOwned + Serialize + Debug>(form: &str, data: &[u8]) -> String {
    let value: T = rmp_serde::from_slice(data).expect("decode");
    let bytes = match form {
        "compact" => rmp_serde::to_vec(&value),
        _ => rmp_serde::to_vec_named(&value),
    };
    format!("{} {:?}", hex(&bytes.expect("encode")), value)
}

fn hex(data: &[u8]) -> String {
    data.iter().map(|byte| format!("{:02x}", byte)).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

fn main() {
    for line in stdin().lock().lines() {
        let line = line.expect("a line");
        let mut words = line.split(' ');
        let (kind, form, data) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let data = unhex(data);
        println!("{}", match kind {
            "request" => again::<HostdRequest>(form, &data),
            "response" => again::<HostdResponse>(form, &data),
            "command" => again::<Command>(form, &data),
            "reply" => again::<Reply>(form, &data),
            "event" => again::<Event>(form, &data),
            _ => panic!("{}", kind),
        });
    }
}
