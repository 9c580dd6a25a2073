-- together: the `sync` of several gates in one call; permits of all of them are given at once or not at all.
--
-- KEYS      those of each gate, as in gate.lua, one gate after the other
-- ARGV[1]   gates      how many
-- ARGV[2]   together   permits wanted of all gates at once
-- ARGV[3]   first      1 = permits wanted of one gate alone come before those
-- ARGV[4]   keep       us for which one place is left free at a gate whose turn it is, when another gate
--                      refuses; 0 = let the others pass
-- ARGV[5..] per gate: how many arguments follow, and ARGV of `sync.lua`, with the gate's own number
--
-- Returns the answer of `sync.lua` of each gate. In its header: together, permits given by all gates, part of
-- `permits`; stands, 1 = the process waits for more of them in the line of this gate.
-- A number that was answered gets the same answer; then the other gates give nothing together.
-- Error NOLIMITS <limit>: that one has no values, and nothing was noted anywhere.
--
-- Decided for all before anything is granted by any. A process stands in the line of each gate that refuses
-- it and lets others pass at those that would not; to get both in the end it has a place kept there at times.
-- The loader puts the parts of sync.lua in front, as the function `open_gate(KEYS, ARGV)`; see steps.lua.

local KEYS_EACH = 8
local wanted, singles_first, keep_us = tonumber(ARGV[2]), ARGV[3] == '1', tonumber(ARGV[4])

local function open_all()
  local gates, at = {}, 5
  for i = 1, tonumber(ARGV[1]) do
    local keys, args, count = {}, {}, tonumber(ARGV[at])
    for k = 1, KEYS_EACH do keys[k] = KEYS[(i - 1) * KEYS_EACH + k] end
    for k = 1, count do args[k] = ARGV[at + k] end
    at = at + count + 1
    gates[i] = open_gate(keys, args)
  end
  return gates
end

-- Per gate the places it would give and those of them left for permits of all gates; how many that makes.
local function decide(gates)
  local caps, left, together = {}, {}, wanted
  for i, gate in ipairs(gates) do
    caps[i] = not gate.answered() and gate.hear() or false
    if not caps[i] then wanted, together = 0, 0 end
  end
  for i, gate in ipairs(gates) do
    if caps[i] then
      left[i] = caps[i] - (singles_first and math.min(caps[i], gate.wanted()) or 0)
      together = math.min(together, left[i])
    end
  end
  return caps, left, together
end

local function grant(gate, cap, left, together)
  local more = together < wanted
  local refuses = left <= together
  local keeps = more and not refuses and keep_us > 0 and gate.may_keep()
  gate.grant(keeps and cap - 1 or cap, together, more and refuses, keeps and keep_us or 0)
end

local gates = open_all()
for _, gate in ipairs(gates) do
  if not gate.meet() then return redis.error_reply('NOLIMITS ' .. gate.limit) end
end
local caps, left, together = decide(gates)
local answers = {}
for i, gate in ipairs(gates) do
  if not gate.answered() then grant(gate, caps[i] or 0, left[i] or 0, together) end
  answers[i] = gate.answer()
end
return answers
